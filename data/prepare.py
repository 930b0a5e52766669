"""Convert annotated images to ArrayRecord shards. This script does the same as `mqformer prepare`.

python data/prepare.py sample --output=data/records
"""

import sys

from mqformer_jax.__main__ import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
