"""Networks of transformers and adapters of peft in a Trainer."""
