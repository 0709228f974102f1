"""The subcommands of `peft-tlora`, one module each: its options and what it prints."""
