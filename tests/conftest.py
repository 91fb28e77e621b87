"""What holds for all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Child processes import the installed package, as this one does, not the folder they start in.
os.environ["PYTHONSAFEPATH"] = "1"
