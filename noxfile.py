"""The test-suite with PEFT's last four minor versions, each with what else was new at its time.

`nox` runs all, `nox -s "tests(0.18)"` one. CI runs the newest through `make test` and the oldest.
"""

import re
from pathlib import Path

import nox

# PEFT: released with it or shortly before; the newest versions are in constraints-cpu.txt
VERSIONS = {
    "0.18": {"peft": "0.18.1", "diffusers": "0.36.0", "transformers": "4.57.6"},
    "0.19": {"peft": "0.19.1", "diffusers": "0.37.1", "transformers": "5.5.4"},
    "0.20": {"peft": "0.20.0", "diffusers": "0.39.0", "transformers": "5.14.1"},
    "0.21": {},
}
LINES = Path("constraints-cpu.txt").read_text().splitlines()
nox.options.error_on_missing_interpreters = True


@nox.session
def newest(session: nox.Session) -> None:
    """Run the suite with the newest of everything but torch, whose CPU build has to be named."""
    torch = next(line for line in LINES if line.startswith("torch=="))
    _test(session, torch)


@nox.session
@nox.parametrize("version", list(VERSIONS), ids=list(VERSIONS))
def tests(session: nox.Session, version: str) -> None:
    """Run the suite with one version of PEFT; quantised bases by stand-ins only."""
    lines = "\n".join(LINES)
    for name, pin in VERSIONS[version].items():
        lines = re.sub(rf"(?m)^{name}==.*$", f"{name}=={pin}", lines)
    _test(session, lines)


def _test(session: nox.Session, constraints: str) -> None:
    path = Path(session.create_tmp(), "constraints.txt")
    path.write_text(constraints)
    session.install("-q", "-c", str(path), "-e", ".[test]")
    session.run(
        *("python", "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile"),
        *session.posargs,
        env={"OMP_NUM_THREADS": "1"},
    )
