"""weightwatcher on a pair of models, in its own environment: prints seconds and its σ₁² as JSON."""

from __future__ import annotations

import json
import sys
import time

import weightwatcher
from transformers import AutoModel

base, tuned = (AutoModel.from_pretrained(path) for path in sys.argv[1:3])
watcher = weightwatcher.WeightWatcher()
start = time.perf_counter()
details = watcher.analyze(model=tuned, base_model=base)
seconds = time.perf_counter() - start
largest = dict(zip(details.longname, (float(value) for value in details.lambda_max), strict=True))
print(json.dumps({"seconds": seconds, "largest": largest, "version": weightwatcher.__version__}))
