"""The torch backend: the full set of features, on transformers and PEFT."""

import logging

# PEFT imports bitsandbytes where it is installed, and that logs an error for each optional kernel it does not find.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
