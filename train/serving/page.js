"use strict";
// The page of train.serve: asks /api, shows pictures while they are denoised. It keeps nothing but this tab's entries.

const find = (id) => document.getElementById(id);
const SAMPLERS = { flow: ["euler", "heun"], other: ["ddpm", "ddim", "dpm++"] };
const running = new Set(); // entries, each with cancel()
let info = null;
let token = sessionStorage.getItem("token") || "";

class Failure extends Error {}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({ error: `status ${answer.status}` }));
  const failure = new Failure(inWords(told));
  failure.status = answer.status;
  throw failure;
}

function inWords({ error, expectation, remedy }) {
  return `${error}${expectation ? `: expected ${expectation}` : ""}${remedy ? `; ${remedy}` : ""}`;
}

async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function open() {
  try {
    info = await (await call("/api/info")).json();
  } catch (error) {
    find("ask").hidden = true;
    find("door").hidden = error.status !== 401;
    if (error.status === 401) find("token").focus();
    return trouble(error.status === 401 && !token ? "" : reason(error));
  }
  find("ask").hidden = false;
  find("door").hidden = true;
  trouble("");
  const { model, defaults, limits, picture, purpose } = info;
  const guided = model.guide ? ` · guided by step ${model.guide.step.toLocaleString("en")}` : "";
  find("model").textContent =
    `step ${model.step.toLocaleString("en")} · ${model.weights} · ${picture[1]} × ${picture[0]} pixels${guided}`;
  find("model").title = model.checkpoint;
  find("purpose").textContent = purpose;
  document.documentElement.style.setProperty("--aspect", picture[1] / picture[0]);
  const kind = SAMPLERS.flow.includes(defaults.sampler) ? "flow" : "other";
  find("sampler").replaceChildren(...SAMPLERS[kind].map((name) => new Option(name, name)));
  for (const name of ["steps", "guidance", "sampler", "temperature", "top_p"]) find(name).value = defaults[name];
  find("n").max = limits.n;
  find("n").value = Math.min(4, limits.n);
  find("prompt").focus();
}

function trouble(words) {
  find("trouble").textContent = words;
  find("trouble").hidden = !words;
}

function reason(error) {
  return error instanceof Failure ? error.message : "The server does not answer. Is train.serve still running?";
}

// A new seed is drawn here, so that the entry and its command can repeat it.
function seed() {
  return find("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(find("seed").value);
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function command(path, kind, data) {
  const secret = token ? ` \\\n  -H "Authorization: Bearer $TRANSFUSION_TOKEN"` : "";
  return `curl -N ${quoted(location.origin + path)} \\\n  -H 'Content-Type: ${kind}'${secret} \\\n  ${data}`;
}

// One card of the history: what was asked, what came, what can be done with it.
class Entry {
  constructor(title, facts, shell, again) {
    this.root = find("entry").content.cloneNode(true).querySelector("article");
    this.part = (selector) => this.root.querySelector(selector);
    this.abort = new AbortController();
    this.begun = performance.now();
    this.part("h2").textContent = title;
    this.part(".facts").textContent = facts;
    this.part("pre").textContent = shell;
    this.part(".cancel").onclick = () => this.cancel();
    this.part(".again").onclick = again;
    this.pictures = this.part(".pictures");
    find("history").prepend(this.root);
    document.body.classList.add("begun");
    running.add(this);
  }

  say(words, share) {
    this.part(".status").textContent = words;
    if (share === undefined) this.part("progress").removeAttribute("value");
    else this.part("progress").value = share;
  }

  // Hanging up would do; asking lets the server say so.
  cancel() {
    if (this.id) call(`/api/requests/${this.id}`, { method: "DELETE" }).catch(() => this.abort.abort());
    else this.abort.abort();
  }

  end(words, failed = false) {
    running.delete(this);
    this.root.classList.add(failed ? "failed" : "ended");
    this.say(words, 0);
    this.part("progress").hidden = this.part(".cancel").hidden = true;
    this.part(".again").hidden = false;
    for (const place of this.pictures.querySelectorAll("div")) place.remove(); // of pictures that never came
  }

  // The time since it was asked, which counts waiting.
  seconds() {
    return `${((performance.now() - this.begun) / 1000).toFixed(1)} s`;
  }

  async follow(work) {
    try {
      await work();
      if (running.has(this)) this.end("The connection ended before the answer.", true);
    } catch (error) {
      if (error.name === "AbortError") this.end("Cancelled.");
      else this.end(reason(error), true);
    }
  }
}

function draw(request) {
  const facts = [`seed ${request.seed}`, `${request.steps} steps`, `guidance ${request.guidance}`, request.sampler];
  const shell = command("/api/draw", "application/json", `-d ${quoted(JSON.stringify(request))}`);
  const entry = new Entry(request.prompt || "(no words)", facts.join(" · "), shell, () => draw(request));
  const images = Array.from({ length: Math.min(request.n, info.limits.n) || 0 }, (_, i) => {
    const image = new Image();
    image.alt = `picture ${i + 1} of ${request.n}: not begun`;
    const place = document.createElement("div");
    entry.pictures.append(place);
    return { image, place };
  });
  entry.pictures.classList.toggle("one", request.n === 1);
  entry.pictures.classList.toggle("pixels", Math.max(...info.picture) <= 96);
  const show = (number, uri, alt) => {
    const { image, place } = images[number];
    image.src = uri;
    image.alt = alt;
    if (place.isConnected) place.replaceWith(image);
  };
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(request), signal: entry.abort.signal };
  entry.say("Asking…");
  entry.follow(async () => {
    for await (const event of linesOf(await call("/api/draw", options))) {
      if (event.event === "queued") {
        entry.id = event.id;
        entry.say(event.waiting ? `Waiting for ${event.waiting} before it…` : "Beginning…");
        if (event.unknown.length) {
          entry.part(".facts").textContent += ` · unknown to the tokenizer: ${event.unknown.join(" ")}`;
        }
      } else if (event.event === "started") {
        entry.say(event.rows > request.n ? `Beginning, in a batch of ${event.rows}…` : "Beginning…");
      } else if (event.event === "step") {
        entry.say(`Step ${event.step} of ${event.steps}`, event.step / event.steps);
        for (const { number, preview } of event.samples) {
          const alt = `picture ${number + 1}, unfinished, step ${event.step} of ${event.steps}`;
          if (preview) show(number, `data:image/webp;base64,${preview}`, alt);
        }
      } else if (event.event === "done") {
        event.samples.forEach((parts, number) => {
          const uri = `data:image/png;base64,${parts.find((part) => part.picture).picture}`;
          show(number, uri, `picture ${number + 1}: ${request.prompt}`);
          download(images[number].image, `${request.seed}-${number}.png`);
        });
        entry.end(`Done in ${entry.seconds()}. Click a picture to keep it.`);
      } else if (event.event === "cancelled") {
        entry.end("Cancelled.");
      } else {
        entry.end(inWords(event), true);
      }
    }
  });
}

function download(image, name) {
  const link = document.createElement("a");
  link.href = image.src;
  link.download = name;
  image.replaceWith(link);
  link.append(image);
}

function describe(file) {
  const wanted = { seed: seed(), temperature: Number(find("temperature").value), top_p: Number(find("top_p").value) };
  describeWith(file, wanted);
}

function describeWith(file, wanted) {
  const path = `/api/describe?${new URLSearchParams(wanted)}`;
  const kind = file.type || "application/octet-stream";
  const facts = `seed ${wanted.seed} · temperature ${wanted.temperature} · top p ${wanted.top_p}`;
  const shell = command(path, kind, `--data-binary @${quoted(file.name || "picture.png")}`);
  const entry = new Entry(file.name || "A picture", facts, shell, () => describeWith(file, wanted));
  const image = new Image();
  image.src = URL.createObjectURL(file);
  image.alt = "the given picture";
  image.className = "given";
  entry.pictures.append(image);
  entry.say("Looking…");
  entry.follow(async () => {
    const options = { method: "POST", headers: { "Content-Type": kind }, body: file, signal: entry.abort.signal };
    const { text } = await (await call(path, options)).json();
    entry.part("blockquote").textContent = text || "(no words)";
    entry.part("blockquote").hidden = false;
    entry.end(`Done in ${entry.seconds()}.`);
  });
}

find("ask").onsubmit = (event) => {
  event.preventDefault();
  const number = (name) => Number(find(name).value);
  const request = { prompt: find("prompt").value, n: number("n"), seed: seed(), steps: number("steps") };
  draw({ ...request, guidance: number("guidance"), sampler: find("sampler").value });
};
find("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("ask").requestSubmit();
};
find("door").onsubmit = (event) => {
  event.preventDefault();
  token = find("token").value;
  sessionStorage.setItem("token", token);
  open();
};
find("file").onchange = () => {
  for (const file of find("file").files) describe(file);
  find("file").value = "";
};
document.onkeydown = (event) => {
  if (event.key === "Escape") running.forEach((entry) => entry.cancel());
};
document.onpaste = (event) => {
  for (const file of event.clipboardData.files) describe(file);
};
document.ondragover = (event) => {
  event.preventDefault();
  find("drop").hidden = !info;
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) find("drop").hidden = true;
};
document.ondrop = (event) => {
  event.preventDefault();
  find("drop").hidden = true;
  if (info) for (const file of event.dataTransfer.files) describe(file);
};
open();
