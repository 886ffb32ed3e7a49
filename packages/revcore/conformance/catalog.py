"""All that is asked, by the names of the table's columns."""

from conformance.peers import PEERS
from conformance.schemes import OURS

ADAPTERS = {adapter.name: adapter for adapter in [*OURS, *PEERS]}
