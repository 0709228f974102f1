"""`python -m peft_tlora`."""

from .cli import main

raise SystemExit(main())
