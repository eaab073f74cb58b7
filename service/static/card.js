// One image: its preview, its request to POST /invocations, and the answer or what went wrong, as a card. What it asks
// of the page around it (`state`, `maxMb`, `poll`, `enqueue`) is in page.js, which follows in the same script.
// Whatever the service or a file says is put in as text, never as markup: class names are not to be trusted.

const PREVIEW_PX = 720; // longest side of a preview: the browser never keeps a whole photo's pixels
const TINY_PX = 96; // below this, pixels are shown as squares
const TIMEOUT_MS = 70000; // the service's own deadline is below SageMaker's 60 s

const WHERE = new URL("invocations", location.href); // also right behind a proxy's prefix
WHERE.search = "?top_k=5";
const STAGES = { decode: "decode", queue: "queue", infer: "engine" };
const TITLES = {
  unreadable_image: "Not an image the service can read",
  image_too_large: "The image is too large",
  image_too_costly: "The image takes too long to decode",
  payload_too_large: "The file is too large",
  unsupported_media_type: "Not an image",
  body_timeout: "The image arrived too slowly",
  overloaded: "The service is busy",
  worker_died: "The service lost this request",
  not_ready: "The service is not ready",
  deadline_exceeded: "No answer in time",
};

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else node.setAttribute(name, value);
  }
  node.append(...children); // strings become text nodes
  return node;
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const ms = (value) => `${value < 100 ? value.toFixed(1) : Math.round(value)} ms`;
const size = (bytes) => (bytes < 1024 * 1024 ? `${Math.ceil(bytes / 1024)} KB` : `${(bytes / 1024 / 1024).toFixed(1)} MB`);

class Card {
  /** `note`: what else is known of the file. `source`: the address it came from, if it is none of the user's. */
  constructor(file, note = "", source = "") {
    this.file = file;
    this.source = source;
    this.name = file.name || "image";
    // What the browser takes for no image is the service's to look at.
    this.type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
    this.frame = el("div", { class: "frame" }, el("span", { class: "muted" }, "…"));
    this.facts = el("p", { class: "muted facts" }, [size(file.size), note].filter(Boolean).join(" · "));
    this.answer = el("div", { class: "answer" });
    this.aborter = new AbortController();
    this.element = el(
      "article",
      { class: "card", "aria-label": this.name },
      el("figure", { class: "picture" }, this.frame, el("figcaption", {}, el("h3", {}, this.name), this.facts)),
      this.answer,
    );
    this.wait();
    this.preview(note);
  }

  show(...nodes) {
    this.answer.replaceChildren(...nodes);
  }

  wait() {
    const why = state === "ready" ? "Waits for its turn…" : "Waits until the service is ready…";
    this.show(el("p", { class: "waiting" }, why));
  }

  /** Draw the first frame, upright and small. Decoding happens off the main thread. */
  async preview(note) {
    const url = URL.createObjectURL(this.file);
    try {
      const image = new Image();
      await new Promise((resolve, reject) => {
        image.onload = resolve;
        image.onerror = reject;
        image.src = url; // only its size is read: nothing is painted
      });
      const { naturalWidth: width, naturalHeight: height } = image;
      const scale = Math.min(1, PREVIEW_PX / Math.max(width, height));
      const resizeWidth = Math.max(1, Math.round(width * scale));
      const resizeHeight = Math.max(1, Math.round(height * scale));
      const bitmap = await createImageBitmap(this.file, { resizeWidth, resizeHeight, resizeQuality: "medium" });
      const canvas = el("canvas", { role: "img", "aria-label": `Preview of ${this.name}` });
      [canvas.width, canvas.height] = [resizeWidth, resizeHeight];
      canvas.getContext("2d").drawImage(bitmap, 0, 0);
      bitmap.close();
      if (Math.max(width, height) <= TINY_PX) canvas.className = "tiny";
      this.frame.replaceChildren(canvas);
      this.facts.textContent = [`${width} × ${height} px`, size(this.file.size), note].filter(Boolean).join(" · ");
    } catch {
      this.frame.replaceChildren(el("span", { class: "muted" }, "The browser cannot show this file"));
    } finally {
      URL.revokeObjectURL(url);
    }
  }

  async classify() {
    this.show(el("p", { class: "waiting" }, "Classifying…"));
    const started = performance.now();
    let response, text;
    try {
      await this.file.slice(0, 1).arrayBuffer();
    } catch {
      this.fail("The file cannot be read", "The browser could not read it. Is it a folder, or was it moved since?");
      return;
    }
    try {
      response = await fetch(WHERE, {
        method: "POST",
        headers: { "Content-Type": this.type, Accept: "application/json" },
        body: this.file,
        signal: AbortSignal.any([this.aborter.signal, AbortSignal.timeout(TIMEOUT_MS)]),
      });
      text = await response.text();
    } catch (problem) {
      if (!this.aborter.signal.aborted) await this.unanswered(problem);
      return;
    }
    let body = null;
    try {
      body = JSON.parse(text);
    } catch {
      // told below
    }
    if (response.ok && Array.isArray(body?.predictions)) this.succeed(response, body, performance.now() - started);
    else this.refused(response, body, text);
  }

  succeed(response, body, roundTripMs) {
    const ranks = el("ol", { class: "ranks", "aria-label": `Likeliest classes of ${this.name}` });
    for (const { label, probability } of body.predictions) {
      const fill = el("div", { class: "fill" });
      fill.style.width = `${100 * probability}%`;
      ranks.append(
        el(
          "li",
          {},
          el("bdi", { class: "label" }, label),
          el("span", { class: "share" }, percent(probability)),
          el("div", { class: "track", "aria-hidden": "true" }, fill),
        ),
      );
    }
    const model = el("p", { class: "muted" }, "Model ", el("bdi", {}, body.model?.name ?? "?"));
    model.append(" · version ", el("bdi", {}, body.model?.version ?? "?"));
    this.show(ranks, times(response.headers.get("Server-Timing"), roundTripMs), model, this.command(), json(body));
    const best = body.predictions[0];
    say(`${this.name}: ${best ? `${best.label}, ${percent(best.probability)}` : "no classes"}`);
  }

  refused(response, body, text) {
    const error = body?.error ?? {};
    const code = typeof error.code === "string" ? error.code : "";
    const id = error.request_id || response.headers.get("X-Request-Id");
    const again = [408, 429].includes(response.status) || response.status >= 500;
    let title = TITLES[code] ?? (again ? "The service failed on this image" : "The request was refused");
    if (response.ok) title = "The answer was not understood"; // something else answers at this address
    const start = text.trim().slice(0, 300);
    const message = error.message || (start ? `It begins with: ${start}` : "It is empty and says no reason.");
    const facts = [`Status ${response.status}`, code && `code ${code}`, id && `request id ${id}`];
    const after = seconds(response.headers.get("Retry-After"));
    this.fail(title, message, {
      again,
      hint: after === null ? "" : `It asks to try again in ${after} s.`,
      facts: facts.filter(Boolean).join(" · "),
    });
    if (response.status === 503) poll();
  }

  /** No answer came: was the file too large to be read to its end, or is the service gone? */
  async unanswered(problem) {
    await poll();
    const tooLarge = maxMb !== null && this.file.size > maxMb * 1024 * 1024;
    if (tooLarge && state === "ready") {
      this.fail(TITLES.payload_too_large, `It has ${size(this.file.size)}, the service takes at most ${maxMb} MB.`);
    } else if (problem.name === "TimeoutError") {
      this.fail("No answer in time", `The service did not answer in ${TIMEOUT_MS / 1000} s.`, { again: true });
    } else {
      this.fail(
        "The connection was lost",
        "No answer arrived. The service may have stopped, or the network may be down.",
        { again: true },
      );
    }
  }

  fail(title, message, { again = false, hint = "", facts = "" } = {}) {
    const problem = el("div", { class: "problem" }, el("h4", {}, title), el("p", {}, message));
    if (hint) problem.append(el("p", {}, hint));
    if (facts) problem.append(el("p", { class: "muted" }, facts));
    if (again) {
      const retry = () => {
        byId("files").focus({ preventScroll: true }); // this button goes away
        enqueue([this]);
      };
      problem.append(el("button", { class: "button small", type: "button", onclick: retry }, "Try again"));
    }
    this.show(problem, this.command());
    say(`${this.name}: ${title}. ${message} ${hint}`);
  }

  /** The same request as a command, quoted for a POSIX shell. */
  command() {
    const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
    const path = this.source ? "-" : this.name.replace(/^-$/, "./-"); // "@-" is standard input
    const words = ["curl", "-H", `Content-Type: ${this.type}`, "--data-binary", `@${path}`, WHERE.href];
    const fetched = this.source ? `curl -s ${quoted(this.source)} | ` : "";
    const line = fetched + words.map(quoted).join(" ");
    const code = el("code", { "aria-label": "The same request as a command" }, line);
    const button = el("button", { class: "button small", type: "button" }, "Copy");
    button.addEventListener("click", () => copy(code, button));
    return el("div", { class: "command" }, code, button);
  }
}

/** The stages' times as a bar and in words; without the header only the round trip. */
function times(header, roundTripMs) {
  const timing = new Map();
  for (const entry of (header ?? "").split(",")) {
    const [name, ...options] = entry.split(";").map((piece) => piece.trim());
    const duration = Number.parseFloat(options.find((option) => option.startsWith("dur="))?.slice(4));
    if (name && duration >= 0) timing.set(name, duration);
  }
  const list = el("dl", { class: "times" });
  const stages = el("div", { class: "stages", "aria-hidden": "true" });
  const add = (name, value, kind) => {
    const swatch = kind ? [el("span", { class: `swatch ${kind}`, "aria-hidden": "true" })] : [];
    list.append(el("div", {}, el("dt", {}, ...swatch, name), el("dd", {}, ms(value))));
    if (!kind) return;
    const part = el("span", { class: kind });
    part.style.flexGrow = value;
    stages.append(part);
  };
  let rest = timing.get("total") ?? 0;
  for (const [stage, name] of Object.entries(STAGES)) {
    if (!timing.has(stage)) continue;
    add(name, timing.get(stage), stage);
    rest -= timing.get(stage);
  }
  if (stages.childElementCount && rest > 0) add("other", rest, "rest");
  if (timing.has("total")) add("total", timing.get("total"), "");
  add("round trip", roundTripMs, "");
  return el("div", {}, ...(stages.childElementCount ? [stages] : []), list);
}

function json(body) {
  const text = el("pre", { tabindex: "0", "aria-label": "Answer as JSON" }, JSON.stringify(body, null, 2));
  return el("details", {}, el("summary", {}, "Answer as JSON"), text);
}

/** Retry-After as seconds: a number, or a date (RFC 9110, 10.2.3). */
function seconds(value) {
  if (!value) return null;
  const wait = /^\d+$/.test(value) ? Number(value) : Math.ceil((Date.parse(value) - Date.now()) / 1000);
  return Number.isFinite(wait) ? Math.max(0, wait) : null;
}
