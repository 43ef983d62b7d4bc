"use strict";
// The page of train.serve: what it asks for, and how pictures are shown while they are denoised. It keeps this tab's entries alone.

const find = (id) => document.getElementById(id);
const SAMPLERS = { flow: ["euler", "heun"], other: ["ddpm", "ddim", "dpm++"] };
const chosen = []; // pictures to change or to ask about: {name, uri}
let info = null;

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
  find("image_guidance").value = defaults.image_guidance ?? "";
  find("n").max = limits.n;
  find("n").value = Math.min(4, limits.n);
  showChosen();
}

// What the form offers depends on whether there are pictures to change.
function showChosen() {
  const given = chosen.length > 0;
  document.querySelector('label[for="prompt"]').textContent = given
    ? "Say what to change, or ask."
    : "Describe a picture, and watch it appear.";
  find("prompt").placeholder = given ? "Make the circle blue" : "A lighthouse at dusk";
  find("draw").textContent = given ? "Change" : "Draw";
  find("of_pictures").hidden = !given || Boolean(info.model.guide);
  find("chosen").replaceChildren(...chosen.map((picture) => {
    const [item, button, image] = ["li", "button", "img"].map((name) => document.createElement(name));
    Object.assign(image, { src: picture.uri, alt: "" });
    Object.assign(button, { type: "button", title: `Remove ${picture.name}` });
    button.setAttribute("aria-label", button.title);
    button.onclick = () => {
      chosen.splice(chosen.indexOf(picture), 1);
      showChosen();
    };
    button.append(image);
    item.append(button);
    return item;
  }));
  find("prompt").focus();
}

async function add(files) {
  const read = (file) =>
    new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve({ name: file.name || "picture.png", uri: reader.result });
      reader.onerror = () => reject(new Failure(`${file.name} cannot be read.`));
      reader.readAsDataURL(file);
    });
  try {
    const added = await Promise.all([...files].map(read));
    const mib = [...chosen, ...added].reduce((sum, { uri }) => sum + uri.length, 0) / 2 ** 20;
    const most = Math.floor(info.limits.bytes / 2 ** 20) - 0.1; // the request has words too
    if (mib > most) throw new Failure(`${mib.toFixed(1)} MiB of pictures: expected at most ${most}; choose smaller ones`);
    chosen.push(...added);
    trouble("");
  } catch (error) {
    trouble(error.message);
  }
  showChosen();
}

function trouble(words) {
  find("trouble").textContent = words;
  find("trouble").hidden = !words;
}

// A new seed is drawn here, so that the entry and its command can repeat it.
function seed() {
  return find("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(find("seed").value);
}

function draw(request, pictures) {
  const facts = [`seed ${request.seed}`, `${request.steps} steps`, `guidance ${request.guidance}`, request.sampler];
  if (request.image_guidance != null) facts.splice(3, 0, `picture guidance ${request.image_guidance}`);
  const again = () => draw(request, pictures);
  const shell = commandOf("/api/draw", request, pictures);
  const entry = new Entry(request.prompt || "(no words)", facts.join(" · "), shell, again);
  entry.give(pictures, true);
  const images = Array.from({ length: Math.min(request.n, info.limits.n) || 0 }, (_, i) => {
    const image = new Image();
    image.alt = `picture ${i + 1} of ${request.n}: not begun`;
    const place = document.createElement("div");
    entry.pictures.append(place);
    return { image, place };
  });
  entry.pictures.classList.toggle("one", request.n === 1);
  entry.part(".sides").classList.toggle("pixels", Math.max(...info.picture) <= 96);
  const show = (number, uri, alt) => {
    const { image, place } = images[number];
    image.src = uri;
    image.alt = alt;
    if (place.isConnected) place.replaceWith(image);
  };
  entry.say("Asking…");
  entry.follow(async () => {
    for await (const event of linesOf(await call("/api/draw", asJson(request, pictures, entry)))) {
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

function ofText() {
  return { seed: seed(), temperature: Number(find("temperature").value), top_p: Number(find("top_p").value) };
}

function describe(file, wanted = ofText()) {
  const path = `/api/describe?${new URLSearchParams(wanted)}`;
  const kind = file.type || "application/octet-stream";
  const name = file.name || "A picture";
  const shell = command(path, kind, `--data-binary @${quoted(file.name || "picture.png")}`);
  const entry = read(name, wanted, shell, () => describe(file, wanted), [{ name, uri: URL.createObjectURL(file) }]);
  const options = { method: "POST", headers: { "Content-Type": kind }, body: file, signal: entry.abort.signal };
  entry.follow(() => write(entry, path, options));
}

function ask(question, pictures, wanted = ofText()) {
  const request = { question, ...wanted, ...(!pictures.length && { pictures: [] }) };
  const shell = commandOf("/api/describe", request, pictures);
  const entry = read(question, wanted, shell, () => ask(question, pictures, wanted), pictures);
  entry.follow(() => write(entry, "/api/describe", asJson(request, pictures, entry)));
}

function read(title, wanted, shell, again, pictures) {
  const facts = `seed ${wanted.seed} · temperature ${wanted.temperature} · top p ${wanted.top_p}`;
  const entry = new Entry(title || "(no words)", facts, shell, again);
  entry.give(pictures, false);
  entry.say("Looking…");
  return entry;
}

async function write(entry, path, options) {
  const { text } = await (await call(path, options)).json();
  entry.part("blockquote").textContent = text.trim() || "(no words)";
  entry.part("blockquote").hidden = false;
  entry.end(`Done in ${entry.seconds()}.`);
}

find("ask").onsubmit = (event) => {
  event.preventDefault();
  const number = (name) => Number(find(name).value);
  const request = { prompt: find("prompt").value, n: number("n"), seed: seed(), steps: number("steps") };
  Object.assign(request, { guidance: number("guidance"), sampler: find("sampler").value });
  if (!find("of_pictures").hidden) {
    request.image_guidance = find("image_guidance").value === "" ? null : number("image_guidance");
  }
  draw(request, [...chosen]);
};
find("question").onclick = () => ask(find("prompt").value, [...chosen]);
find("add").onchange = async () => {
  await add(find("add").files);
  find("add").value = "";
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
  if (!info) return;
  if (event.target.closest?.("#ask")) add(event.dataTransfer.files);
  else for (const file of event.dataTransfer.files) describe(file);
};
open();
