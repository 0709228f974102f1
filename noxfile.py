"""The test-suite with the oldest and the newest versions that `pip install` takes.

CI runs the pinned ones of constraints-cpu.txt through `make test`, and `newest` as a warning.
"""

import re
from pathlib import Path

import nox

OLDEST = {"peft": "0.21.0", "diffusers": "0.42.0", "transformers": "4.57.6"}
LINES = Path("constraints-cpu.txt").read_text().splitlines()
nox.options.error_on_missing_interpreters = True


@nox.session
def newest(session: nox.Session) -> None:
    """Run the suite with the newest of everything but torch, whose CPU build has to be named."""
    torch = next(line for line in LINES if line.startswith("torch=="))
    _test(session, torch)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the suite with the oldest versions; quantised bases by stand-ins only."""
    lines = "\n".join(LINES)
    for name, pin in OLDEST.items():
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
