"""The training script is run as a file, so its modules import each other by plain names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
