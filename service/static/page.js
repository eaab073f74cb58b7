// The page for people: takes images, sends each when its turn comes (card.js), watches whether the service is there.

const AT_ONCE = 2; // requests under way; the service batches, but other clients are to be served too
const MOST_FILES = 50; // taken from one drop or choice
const POLL_MS = { ready: 5000, other: 1500 };

const STATES = {
  ready: "Ready",
  loading: "Loading the model…",
  warming_up: "Warming up…",
  failing: "The engine fails; the service's log says why",
  stuck: "The engine does not come back from a batch; the service's log says more",
  stopping: "Stopping: it takes no more requests",
  failed: "The model cannot be served; the service's log says why",
};

let state = "asking"; // of the service: a status of /ping, or "lost"
let maxMb = null; // from /execution-parameters, where the service has it
let underWay = 0;
let pollTimer = 0;
const waiting = []; // cards whose turn has not come
const shown = []; // all cards

// --- is the service there -------------------------------------------------------------------------------------------

async function poll() {
  clearTimeout(pollTimer);
  let next = "lost";
  try {
    const response = await fetch("ping", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    const body = await response.json().catch(() => ({}));
    next = response.ok ? "ready" : String(body.status || body.error?.code || `status ${response.status}`);
  } catch {
    // no connection
  }
  if (next !== state) {
    state = next;
    byId("state").dataset.state = { ready: "ready", lost: "lost", failed: "lost" }[state] || "waiting";
    byId("state-text").textContent =
      state === "lost" ? "The service does not answer; trying again" : (STATES[state] ?? `Not ready (${state})`);
    for (const card of waiting) card.wait();
    if (state === "ready") {
      askModel();
      askLimit();
    }
  }
  if (state === "ready") work();
  clearTimeout(pollTimer); // another poll may have ended meanwhile
  if (!document.hidden) pollTimer = setTimeout(poll, state === "ready" ? POLL_MS.ready : POLL_MS.other);
}

/** Of what answers: another model may be there each time that the service comes back. */
async function askModel() {
  try {
    const response = await fetch("model", { cache: "no-store" });
    if (!response.ok) return;
    const { name, version, classes, caution } = await response.json();
    const facts = el("p", {}, "Model ", el("bdi", {}, name), ` · version ${version} · ${classes} classes`);
    byId("model").replaceChildren(facts, ...(caution ? [el("p", { class: "caution" }, caution)] : []));
  } catch {
    // each answer names its model too
  }
}

async function askLimit() {
  try {
    const response = await fetch("execution-parameters");
    if (!response.ok) return;
    maxMb = (await response.json()).MaxPayloadInMB ?? null;
    byId("limit").textContent = maxMb ? `, up to ${maxMb} MB each` : "";
  } catch {
    // the service itself refuses what is too large
  }
}

// --- many images ----------------------------------------------------------------------------------------------------

function enqueue(cards) {
  for (const card of cards) {
    card.wait();
    waiting.push(card);
  }
  if (state === "ready") work();
  else poll();
}

function work() {
  while (underWay < AT_ONCE && waiting.length && state === "ready") {
    underWay += 1;
    waiting
      .shift()
      .classify()
      .finally(() => {
        underWay -= 1;
        work();
      });
  }
}

function take(files, note = "", source = "") {
  const taken = [...files].slice(0, MOST_FILES);
  notice(files.length > taken.length ? `The first ${MOST_FILES} of ${files.length} files are taken; choose the others next.` : "");
  const cards = taken.map((file) => new Card(file, note, source));
  shown.push(...cards);
  byId("results").prepend(...cards.map((card) => card.element));
  byId("results-section").hidden = false;
  enqueue(cards);
}

async function takeExample() {
  notice("");
  let response;
  try {
    response = await fetch("example", { cache: "no-store" });
    if (!response.ok) {
      const body = await response.json().catch(() => ({}));
      notice(`There is no example: ${body.error?.message ?? `status ${response.status}.`}`);
      return;
    }
    const blob = await response.blob();
    const label = response.headers.get("X-Example-Label");
    const name = `example.${blob.type.split("/")[1] || "image"}`;
    const note = label ? `its class: ${decodeURIComponent(label)}` : "";
    take([new File([blob], name, { type: blob.type })], note, response.url);
  } catch {
    notice("The example did not arrive: the connection was lost. Try again.");
    poll();
  }
}

function clearAll() {
  waiting.length = 0;
  for (const card of shown.splice(0)) card.aborter.abort();
  byId("results").replaceChildren();
  byId("results-section").hidden = true;
  notice("");
  byId("files").focus();
  say("The results are cleared.");
}

// --- wires ----------------------------------------------------------------------------------------------------------

byId("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // the same file may be chosen again
});
byId("example").addEventListener("click", takeExample);
byId("clear").addEventListener("click", clearAll);

addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  else notice("That was no file. An image of another page has to be saved first, then dropped from its folder.");
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
  else notice("The clipboard holds no image.");
});
document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
