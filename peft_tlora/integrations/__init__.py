"""The contact with private parts of torch, PEFT and diffusers, one module each."""
