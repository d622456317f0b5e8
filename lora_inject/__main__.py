"""``python -m lora_inject``: the same as the command ``lora-inject``."""

import sys

from lora_inject.cli.main import main

sys.exit(main())
