"""The ceiling of HTTP: a FastAPI route on uvicorn that reads the body and answers a fixed JSON of our usual size."""

import json
import sys

import uvicorn
from fastapi import FastAPI, Request, Response

TOP = [{"label": f"class {i:02d}", "index": i, "probability": 0.123456789} for i in range(5)]
ANSWER = json.dumps({"model": {"name": "resnet34-bench", "version": "0" * 12}, "predictions": TOP}).encode()

app = FastAPI()


@app.get("/ping")
async def ping() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/invocations")
async def invocations(request: Request) -> Response:
    await request.body()
    return Response(ANSWER, media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
