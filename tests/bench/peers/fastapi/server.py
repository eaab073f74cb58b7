"""FastAPI on uvicorn, the tutorials' way: the model is loaded with the module, the handler runs it.

The body is read from the request directly (https://fastapi.tiangolo.com/advanced/using-request-directly/), which costs
less than a form; more workers are the documented way to more cores (https://fastapi.tiangolo.com/deployment/server-workers/).
"""

from classifier import load
from fastapi import FastAPI, Request

app = FastAPI()
classifier = load()


@app.get("/health")
async def health():
    return {"status": "ok"}


@app.post("/predict")
async def predict(request: Request):
    image = classifier.decode(await request.body())
    return {"predictions": classifier.predict([image])[0]}
