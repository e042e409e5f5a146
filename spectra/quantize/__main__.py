"""The command ``python -m spectra.quantize``; it lives in `spectra.quantized`, the floor that sees whole models."""

from __future__ import annotations

import sys

from spectra.quantized.command import main

if __name__ == "__main__":
    sys.exit(main())
