"""Everything that is run on this repository: tests, checks, documents and the main job.

``python -m nox`` runs the default sessions, ``python -m nox -l`` lists all of them.

Each wheel is built once a run (session ``build``), and what is tested is that wheel, never the
sources. torch takes 5 GB on Linux and is installed once (session ``torch``). Every other
environment is made anew, holds what its package declares, and sees that torch through a .pth file.
"""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"

ROOT = Path(__file__).parent
PACKAGES = ("revcore", "revmodels", "revdata", "revtrain")
EVERYTHING = "revtrain"  # depends on all others
TEST_TOOLS = ("pytest>=8.3", "pytest-xdist>=3.6", "hypothesis", "sybil>=9")
# Tests, one at a time on each processor.
SIDE_BY_SIDE = ("-n", "auto")
# Tests of one file may share a run that takes long.
BY_FILE = (*SIDE_BY_SIDE, "--dist=loadfile")


def metadata(package: str) -> dict[str, object]:
    """The [project] table of a package."""
    return dict(nox.project.load_toml(ROOT / "packages" / package / "pyproject.toml")["project"])


def folder(session: nox.Session, name: str) -> Path:
    """The environment of another session, under the same Python."""
    suffix = f"-{session.python}".replace(".", "-") if isinstance(session.python, str) else ""
    return Path(session.virtualenv.location).with_name(name + suffix)


def evaluate(session: nox.Session, module: str, expression: str) -> str:
    """What an expression yields in the session's environment."""
    code = f"import {module}; print({expression})"
    return str(session.run("python", "-c", code, silent=True)).strip()


def constraints(session: nox.Session, *more: str) -> str:
    """The pip option that takes our four names from this run's wheels, never from PyPI."""
    wheels = sorted((folder(session, "build") / "wheels").glob("*/*.whl"))
    lines = [f"{wheel.parent.name} @ {wheel.as_uri()}" for wheel in wheels]
    file = Path(session.virtualenv.location) / "constraints.txt"
    file.write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    return f"--constraint={file}"


def see_torch(session: nox.Session) -> str:
    """Make the one torch importable here, and return the requirement that it meets."""
    scheme = {"base": str(folder(session, "torch"))}
    here = evaluate(session, "sysconfig", "sysconfig.get_path('purelib')")
    there = evaluate(session, "sysconfig", f"sysconfig.get_path('purelib', vars={scheme})")
    Path(here, "torch.pth").write_text(there + "\n", encoding="utf-8")
    version = evaluate(session, "importlib.metadata", "importlib.metadata.version('torch')")
    return f"torch=={version}"


def install(session: nox.Session, *requirements: str) -> None:
    """Install requirements beside the one torch: ours from the wheels, the others from PyPI."""
    session.install(constraints(session, see_torch(session)), *requirements)


def run_tests(session: nox.Session, package: str, *command: str) -> None:
    """Run the doctests of an installed package, its tests and the Python blocks of its README."""
    session.run(
        *(command or ("python", "-m", "pytest")),
        *(() if command else BY_FILE if package == "revtrain" else SIDE_BY_SIDE),
        # A module that needs Triton is not there where Triton is not.
        *("--doctest-modules", "--doctest-ignore-import-errors"),
        *("--pyargs", package, f"packages/{package}/tests"),
        f"tests/test_documents.py::test_python_blocks_run[packages/{package}/README.md]",
        *session.posargs,
    )


@nox.session
def build(session: nox.Session) -> None:
    """Check the metadata of each package with poetry; build its wheel and source archive."""
    session.install("poetry>=2.1,<3")
    wheels = Path(session.virtualenv.location) / "wheels"
    for package in PACKAGES:
        project = str(ROOT / "packages" / package)
        session.run("poetry", "check", "--project", project)
        session.run("poetry", "build", "--project", project, "--output", str(wheels / package))


@nox.session(reuse_venv=True, default=False)
def torch(session: nox.Session) -> None:
    """Install torch, once for all sessions and runs."""
    session.install("torch")


@nox.session(name="tests-revcore", requires=["build", "torch"])
def tests_revcore(session: nox.Session) -> None:
    """Test the wheel of revcore where there is torch and nothing else."""
    requirement = see_torch(session)
    session.install(constraints(session, requirement), "--no-deps", "revcore")
    session.run("python", "-m", "pip", "check")
    for absent in ("numpy", "torchvision", "revmodels"):
        found = evaluate(session, "importlib.util", f"importlib.util.find_spec({absent!r})")
        if found != "None":
            session.error(f"{absent} is in the environment that should hold torch alone: {found}")
    session.install(constraints(session, requirement), *TEST_TOOLS)
    run_tests(session, "revcore")
    session.run("python", "-m", "pytest", *SIDE_BY_SIDE, "packages/revcore/conformance")


@nox.session(name="tests-revmodels", requires=["build", "torch"])
def tests_revmodels(session: nox.Session) -> None:
    """Test the wheel of revmodels."""
    install(session, "revmodels", *TEST_TOOLS, "numpy")  # for Triton's interpreter
    run_tests(session, "revmodels")


@nox.session(name="tests-revdata", requires=["build", "torch"])
def tests_revdata(session: nox.Session) -> None:
    """Test the wheel of revdata with its extra."""
    install(session, "revdata[digits]", *TEST_TOOLS)
    run_tests(session, "revdata")


@nox.session(name="tests-revtrain", requires=["build", "torch"])
def tests_revtrain(session: nox.Session) -> None:
    """Test the wheel of revtrain, the Python blocks of every document, and the benchmarks."""
    install(session, "revtrain", *TEST_TOOLS, "tensorboard")  # one tracker, to test --log-with
    run_tests(session, "revtrain")
    files = ("documents", "pages", "benchmarks", "lines_of_code")
    tests = [f"tests/test_{file}.py" for file in files]
    session.run("python", "-m", "pytest", *SIDE_BY_SIDE, *tests)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    session.install("ruff==0.17.*")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(default=False, venv_backend="none")
def lines(session: nox.Session) -> None:
    """Count the lines of code of revcore."""
    session.run("python", "tests/lines_of_code.py", "packages/revcore/src/revcore")


@nox.session(requires=["build", "torch"])
def types(session: nox.Session) -> None:
    """Check the types of each package against the installed wheels of the others."""
    install(session, EVERYTHING, "mypy==2.*")
    for package in PACKAGES:
        session.run("mypy", "--strict", f"packages/{package}/src")


@nox.session(requires=["build"])
def imports(session: nox.Session) -> None:
    """Check that imports run one way and that each package declares what it imports."""
    session.install("import-linter>=2.3", "deptry>=0.23")
    session.install(constraints(session), "--no-deps", *PACKAGES)
    session.run("lint-imports")
    for package in PACKAGES:
        with session.chdir(ROOT / "packages" / package):
            session.run("deptry", "src", "--package-module-name-map", "scikit-learn=sklearn")
    # deptry holds revcore to what it declares; this holds it to torch.
    if metadata("revcore")["dependencies"] != ["torch>=2.6"]:
        session.error("revcore depends on torch alone")


def build_site(session: nox.Session) -> None:
    """Build the documents into site/; their sources are read, not imported."""
    session.install(
        *("mkdocs-material>=9.8.1,<10", "mkdocstrings[python]>=1.0,<2", "ruff==0.17.*"),
        "pytest>=8.3",
    )
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documents into site/, and test what was built."""
    build_site(session)
    session.run("python", "-m", "pytest", "tests/test_site.py", *session.posargs)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Look at the documents in a real browser; leaves pictures in screenshots/."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.error("no Chromium on this machine: apt-get install chromium (Debian), or Chrome")
    build_site(session)
    session.install("playwright>=1.50")  # drives the Chromium that is there, downloads none
    session.run("python", "-m", "pytest", "tests/test_browser.py", *session.posargs)


@nox.session(requires=["build", "torch"], default=False)
def train(session: nox.Session) -> None:
    """Run the main job: train a RevNet on real images; arguments after -- go to revtrain."""
    install(session, EVERYTHING)
    # Two minutes of digits may be replaced; what a user asks for is kept unless he says --fresh.
    arguments = session.posargs or ("--data", "digits", "--fresh")
    session.run("python", "-m", "revtrain", "train", *arguments)


@nox.session(name="tests-torch", requires=["build"], default=False)
@nox.parametrize("release", ["oldest", "newest"], ids=["oldest", "newest"])
def tests_torch(session: nox.Session, release: str) -> None:
    """Test all wheels with the oldest or the newest torch that they support."""
    # The interpreter of that torch's Triton takes no newer numpy.
    pin = ["torch==2.6.*", "numpy<2.4"] if release == "oldest" else []
    session.install(constraints(session, *pin), EVERYTHING, *TEST_TOOLS)
    for package in PACKAGES:
        run_tests(session, package)


@nox.session(requires=["build", "torch"], default=False)
def conformance(session: nox.Session) -> None:
    """Ask the same questions of ours and of other libraries; write the record and the tables."""
    install(session, "revcore", "numpy")
    # What they import is torch and numpy; what they declare would bring another torch.
    session.install("--no-deps", "memcnn", "revtorch", "revlib")
    suite = "packages/revcore/conformance"
    arguments = session.posargs or ("--output", f"{suite}/results/cpu.json", "--check")
    session.run("python", suite, *arguments)
    session.run("python", suite, "--render")


@nox.session(requires=["build", "torch"], default=False)
def memcnn(session: nox.Session) -> None:
    """Load what MemCNN saves, and run MemCNN's own tests on ours."""
    install(session, "revmodels", "numpy", "torchvision", *TEST_TOOLS)
    # What it declares would bring another torch, and packages that its nets do not need.
    session.install("--no-deps", "memcnn")
    session.run("python", "-m", "pytest", "tests/memcnn")
    suite = ("python", "-m", "pytest", "-p", "shim", "--pyargs")
    parts = ("config", "data", "experiment", "models", "trainers", "utils")
    paths = {"PYTHONPATH": str(ROOT / "tests" / "memcnn")}
    tests = [f"memcnn.{part}.tests" for part in parts]
    session.run(*suite, *tests, "tests/memcnn/test_trainer.py", env=paths)
    session.run(*suite, "memcnn.models.tests", "--left-alone", env=paths)


@nox.session(requires=["build", "torch"])
def examples(session: nox.Session) -> None:
    """Run the examples, each in less than a minute."""
    packages = ("torchvision", "scikit-learn", "lightning", "pytest>=8.3", "pytest-xdist>=3.6")
    install(session, "revmodels", *packages)
    session.run("python", "-m", "pytest", *SIDE_BY_SIDE, "tests/test_examples.py", *session.posargs)


@nox.session(requires=["build", "torch"], default=False)
def chaos(session: nox.Session) -> None:
    """Kill tiny training runs at random moments, resume them and compare bits; -- --kills 300."""
    install(session, EVERYTHING, *TEST_TOOLS)
    session.run("python", "benchmarks/chaos.py", *session.posargs)


@nox.session(requires=["build", "torch"], default=False)
def coverage(session: nox.Session) -> None:
    """Measure which lines of the packages their tests run."""
    install(session, EVERYTHING, *TEST_TOOLS, "coverage>=7.10")
    session.run("coverage", "erase")
    for package in PACKAGES:
        run_tests(session, package, "coverage", "run", "-m", "pytest")
    session.run("coverage", "combine")
    session.run("coverage", "report")


@nox.session(requires=["build", "torch"], default=False)
def benchmarks(session: nox.Session) -> None:
    """Time a training step on the CPU, beside other libraries; arguments after -- replace ours."""
    install(session, EVERYTHING, "numpy")
    # What they import is torch and numpy; what they declare would bring another torch.
    session.install("--no-deps", "memcnn", "revtorch", "revlib")
    small = ("--cpu", "--blocks", "4", "4", "4", "--channels", "4", "4", "8", "16")
    small += ("--batch-size", "16", "--image-size", "16", "--seconds", "60")
    session.run("python", "benchmarks/step.py", *(session.posargs or small))
    if not session.posargs:
        shallow = ("--layers", "20", "60", "--channels", "4", "4", "8", "8", "--steps", "25")
        shallow += ("--cpu", "--data", "digits", "--batch-size", "50")
        session.run("python", "benchmarks/ten_thousand.py", *shallow)
        batches = ("--cpu", "--gigabytes", "--batches", "4", "8", *small[1:10])
        session.run("python", "benchmarks/batch.py", *batches)
