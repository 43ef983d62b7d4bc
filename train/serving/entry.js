"use strict";
// How the page asks the server, how a command does the same, and a card of the history.

const GAP = "\u{10ffff}"; // stands for a picture in a command
const running = new Set(); // entries, each with cancel()
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

function reason(error) {
  return error instanceof Failure ? error.message : "The server does not answer. Is train.serve still running?";
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function command(path, kind, data) {
  const secret = token ? ` \\\n  -H "Authorization: Bearer $TRANSFUSION_TOKEN"` : "";
  return `curl -N ${quoted(location.origin + path)} \\\n  -H 'Content-Type: ${kind}'${secret} \\\n  ${data}`;
}

// The same for a request as JSON, with its pictures read from their files.
function commandOf(path, request, pictures) {
  if (!pictures.length) return command(path, "application/json", `-d ${quoted(JSON.stringify(request))}`);
  const [first, ...others] = JSON.stringify({ ...request, pictures: pictures.map(() => GAP) }).split(GAP);
  const rest = others.map((text, i) => `base64 -w0 ${quoted(pictures[i].name)}; printf %s ${quoted(text)}; `);
  return `{ printf %s ${quoted(first)}; ${rest.join("")}} | ${command(path, "application/json", "-d @-")}`;
}

function asJson(request, pictures, entry) {
  const body = JSON.stringify(pictures.length ? { ...request, pictures: pictures.map(({ uri }) => uri) } : request);
  return { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: entry.abort.signal };
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
    this.pictures = this.part(".after .pictures");
    find("history").prepend(this.root);
    document.body.classList.add("begun");
    running.add(this);
  }

  // Show what was given: beside what becomes of it, or alone.
  give(pictures, becomes) {
    this.part(".before").hidden = !pictures.length;
    for (const { uri, name } of pictures) {
      const image = Object.assign(new Image(), { src: uri, alt: `given: ${name}` });
      this.part(".before .pictures").append(image);
    }
    this.part(".before figcaption").hidden = !becomes;
    this.part(".after figcaption").hidden = !becomes || !pictures.length;
    this.part(".after").hidden = !becomes;
    this.part(".sides").classList.toggle("two", becomes && pictures.length > 0);
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
