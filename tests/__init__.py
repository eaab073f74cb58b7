"""A package, since smdebug-rulesconfig (which `sagemaker` brings) installs one of this name, which would hide a folder."""
