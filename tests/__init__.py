"""A package, since smdebug-rulesconfig (of the group sagemaker) installs one of this name that would hide a folder."""
