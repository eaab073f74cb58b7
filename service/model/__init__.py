"""What training and serving must agree on: images, preprocessing, network, artifact.

Imports neither FastAPI nor anything of AWS; training imports this package and nothing else of `service`.
"""
