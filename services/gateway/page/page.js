"use strict";
// The page of the gateway. Everything is asked of the gateway itself; nothing is kept when the page is left.

const at = (id) => document.getElementById(id);
const CANVASES = ["original", "sanitized", "difference"];
const LESION = [230, 159, 0], ABSTAINS = [86, 180, 233];  // Okabe and Ito's orange and sky blue
const HEALTH_MS = 5000;

const view = {zoom: 1, x: 0.5, y: 0.5};  // what part is shown, the same in all three pictures
let shown = null;  // {original, sanitized: ImageData, mask, abstention: ImageData | null}
let chosen = null;  // the file that was asked about last
let turn = 0;  // answers to older questions are dropped
let samplesListed = false;

function headers() {
  return at("key").value ? {"X-API-Key": at("key").value} : {};
}

async function asked(path, options = {}) {
  let response;
  try {
    response = await fetch(path, {...options, headers: {...headers(), Accept: "application/json"}});
  } catch {
    throw new Error("The gateway cannot be reached.");
  }
  if (response.ok) return response;
  let told = response.statusText;
  try { told = (await response.json()).error; } catch { /* not in the gateway's form */ }
  const after = response.headers.get("Retry-After");
  throw new Error(`${told}${after ? ` (again in ${after} s)` : ""}`);
}

function upload(path, file) {
  const body = new FormData();
  body.append("file", file, file.name);
  return asked(path, {method: "POST", body}).then((response) => response.json());
}

// ---- asking -------------------------------------------------------------------------------------------------------

async function ask(file) {
  if (!file) return;
  chosen = file;
  const mine = ++turn;
  at("error").hidden = true;
  at("busy").hidden = false;
  at("again").disabled = true;
  try {
    const mode = at("mode").value;  // none yet, where the image comes before the gateway has told its modes
    const bare = at("compare").checked && !at("compare-label").hidden;
    const [images, answer, without] = await Promise.all([
      upload("page/sanitized", file),
      upload(mode ? `predict?mode=${encodeURIComponent(mode)}` : "predict", file),
      bare ? upload("page/bare", file) : null,
    ]);
    const [original, sanitized, mask, abstention] = await Promise.all(
      [images.original, images.sanitized, answer.mask, answer.abstention].map(pixels));
    if (mine !== turn) return;
    shown = {original, sanitized, mask, abstention, largest: images.largest};
    Object.assign(view, {zoom: 1, x: 0.5, y: 0.5});
    tell(answer, without);
    at("pictures").hidden = at("answer").hidden = false;
    draw();
  } catch (error) {
    if (mine !== turn) return;
    at("error").textContent = error.message;
    at("error").hidden = false;
    at("pictures").hidden = at("answer").hidden = true;
  } finally {
    if (mine === turn) {
      at("busy").hidden = true;
      at("again").disabled = false;
    }
  }
  health();
}

async function pixels(png) {
  if (!png) return null;
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

// ---- pictures -----------------------------------------------------------------------------------------------------

function draw() {
  if (!shown) return;
  const times = 2 ** Number(at("amplify").value);
  at("times").textContent = times;
  at("zoom").textContent = Math.round(view.zoom * 10) / 10;
  const ends = Math.round(1275 / times) / 10;  // of the scale, in grey levels
  at("scale-text").textContent =
    `−${ends} to +${ends} grey levels of 255; the largest change is ${(255 * shown.largest).toFixed(1)}`;
  paint("original", overlaid(shown.original));
  paint("sanitized", overlaid(shown.sanitized));
  paint("difference", difference(times));
  const segments = shown.mask !== null;
  for (const id of ["opacity", "opacity-label", "legend"]) at(id).hidden = !segments;
  at("legend-abstains").hidden = !shown.abstention;
}

function overlaid(image) {
  if (!shown.mask) return image;
  const opacity = Number(at("opacity").value) / 100;
  const {width, height} = image;
  const result = new ImageData(new Uint8ClampedArray(image.data), width, height);
  const under = (mask, x, y) => {  // the mask has the size of the upload
    const column = Math.floor((x + 0.5) * mask.width / width), row = Math.floor((y + 0.5) * mask.height / height);
    return mask.data[4 * (row * mask.width + column)];
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const abstains = shown.abstention && under(shown.abstention, x, y) > 0;
      const colour = abstains ? ((x + y) % 4 < 2 ? ABSTAINS : null) : under(shown.mask, x, y) > 0 ? LESION : null;
      if (!colour) continue;
      const place = 4 * (y * width + x);
      for (let channel = 0; channel < 3; channel++) {
        result.data[place + channel] = (1 - opacity) * result.data[place + channel] + opacity * colour[channel];
      }
    }
  }
  return result;
}

function difference(times) {
  const {width, height} = shown.original;
  const result = new ImageData(width, height);
  const [cold, middle, warm] = [[33, 102, 172], [247, 247, 247], [178, 24, 43]];
  for (let place = 0; place < result.data.length; place += 4) {
    let change = 0;
    for (let channel = 0; channel < 3; channel++) {
      change += (shown.sanitized.data[place + channel] - shown.original.data[place + channel]) / 3;
    }
    const share = Math.max(-1, Math.min(1, change * times / 127.5));
    const end = share < 0 ? cold : warm;
    for (let channel = 0; channel < 3; channel++) {
      result.data[place + channel] = middle[channel] + Math.abs(share) * (end[channel] - middle[channel]);
    }
    result.data[place + 3] = 255;
  }
  return result;
}

function paint(id, image) {
  const canvas = at(id);
  const size = Math.max(64, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
  canvas.width = canvas.height = size;
  const whole = new OffscreenCanvas(image.width, image.height);
  whole.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  const scale = view.zoom * Math.min(size / image.width, size / image.height);
  const left = size / 2 - view.x * image.width * scale, top = size / 2 - view.y * image.height * scale;
  context.drawImage(whole, left, top, image.width * scale, image.height * scale);
}

function move(x, y, zoom) {
  view.zoom = Math.max(1, Math.min(32, zoom));
  const half = 0.5 / view.zoom;
  view.x = Math.max(half, Math.min(1 - half, x));
  view.y = Math.max(half, Math.min(1 - half, y));
  draw();
}

for (const id of CANVASES) {
  const canvas = at(id);
  let from = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    from = {x: event.clientX, y: event.clientY, at: {...view}};
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!from) return;
    const per = canvas.clientWidth * view.zoom;
    move(from.at.x - (event.clientX - from.x) / per, from.at.y - (event.clientY - from.y) / per, view.zoom);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { from = null; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    move(view.x, view.y, view.zoom * (event.deltaY < 0 ? 1.2 : 1 / 1.2));
  }, {passive: false});
  canvas.addEventListener("keydown", (event) => {
    const step = 0.1 / view.zoom;
    const moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
    const zooms = {"+": 1.5, "=": 1.5, "-": 1 / 1.5};
    if (moves[event.key]) move(view.x + moves[event.key][0], view.y + moves[event.key][1], view.zoom);
    else if (zooms[event.key]) move(view.x, view.y, view.zoom * zooms[event.key]);
    else return;
    event.preventDefault();
  });
}
at("zoom-in").addEventListener("click", () => move(view.x, view.y, view.zoom * 1.5));
at("zoom-out").addEventListener("click", () => move(view.x, view.y, view.zoom / 1.5));
at("zoom-reset").addEventListener("click", () => move(0.5, 0.5, 1));
at("amplify").addEventListener("input", draw);
at("opacity").addEventListener("input", draw);
window.addEventListener("resize", draw);

// ---- words --------------------------------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function headline(answer) {
  if (answer.mask) return `${percent(answer.lesion_fraction)} of the image is marked`;
  if (answer.label === null) return "No answer";
  return answer.label;
}

function tell(answer, without) {
  const evidence = answer.evidence, abstained = evidence.abstained === true;
  at("verdict").textContent = headline(answer);
  at("verdict").className = abstained ? "bad" : "";
  at("meaning").textContent = meaning(answer);
  const rows = answer.labels.map((label, place) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = label;
    const cell = document.createElement("td");
    const bar = document.createElement("meter");
    bar.min = 0;
    bar.max = 1;
    bar.value = answer.probabilities?.[place] ?? 0;
    bar.setAttribute("aria-label", label);
    cell.append(bar, ` ${percent(bar.value)}`);
    row.append(name, cell);
    if (evidence.votes) {
      const votes = document.createElement("td");
      votes.textContent = evidence.votes[place];
      row.append(votes);
    }
    return row;
  });
  at("classes").hidden = !answer.probabilities;
  at("votes-title").hidden = !evidence.votes;
  at("share-title").textContent = evidence.mode === "sanitize" ? "Probability" : "Share of the votes";
  at("classes").tBodies[0].replaceChildren(...rows);
  list("evidence", {
    ...Object.fromEntries(Object.entries(evidence).filter(([, value]) => !Array.isArray(value))),
    artifact: `${answer.artifact.name}, version ${answer.artifact.version} (${answer.artifact.id})`,
  });
  at("bare").hidden = without === null;
  if (without !== null) {
    const same = without.mask ? null : without.label === answer.label;
    const differs = abstained ? " The gateway gives no answer."
      : same === false ? " The gateway answers otherwise." : same ? " The gateway agrees." : "";
    at("bare-verdict").textContent = `The bare model says: ${headline(without)}.${differs}`;
    at("bare-verdict").className = same === false ? "bad" : "";
  }
}

function meaning(answer) {
  const evidence = answer.evidence;
  if (evidence.abstained) {
    return "The gateway abstains: the answers to noisy copies of the image were too close to call.";
  }
  const parts = [];
  if (evidence.abstained_fraction > 0) {
    parts.push(`For ${percent(evidence.abstained_fraction)} of the pixels there is no answer.`);
  }
  if (evidence.radius !== undefined) {
    const levels = (255 * evidence.radius_linf).toFixed(2);
    parts.push(
      `Certified: no change of the image whose root of summed squares is below ${evidence.radius.toFixed(3)} (every ` +
      `pixel by ${levels} of 255 grey levels is such a change) alters this answer of the smoothed model; the chance ` +
      `that this claim is wrong is at most ${evidence.alpha}. Larger changes are not covered.`);
  } else if (evidence.mode === "smooth") {
    parts.push(`The answer of the majority of ${evidence.n} noisy copies; nothing is certified about attacks.`);
  } else {
    parts.push("One pass through the sanitizer; nothing is certified about attacks.");
  }
  return parts.join(" ");
}

function list(id, entries) {
  at(id).replaceChildren(...Object.entries(entries).flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name.replaceAll("_", " ");
    text.textContent = value;
    return [term, text];
  }));
}

// ---- the gateway now ----------------------------------------------------------------------------------------------

async function health() {
  let state;
  try {
    state = await (await asked("page/state")).json();
  } catch (error) {
    list("state", {state: error.message});
    return;
  }
  const compared = state.shadow ? (state.shadow.agreed ?? 0) + (state.shadow.disagreed ?? 0) : 0;
  list("state", {
    ready: state.ready ? "yes" : "no: the model behind it does not answer",
    sanitizer: `${state.artifact}, version ${state.version}`,
    "the model's time": state.upstream_ms === null ? "not asked yet" : `${state.upstream_ms.toFixed(0)} ms on average`,
    "queries spent by you": state.left === null ? state.queries : `${state.queries}, ${state.left} left`,
    "answers changed by the sanitizer": state.shadow === null ? "not watched"
      : compared ? `${state.shadow.disagreed ?? 0} of ${compared}` : "none compared yet",
  });
  if (!at("mode").options.length) {
    for (const mode of state.modes) at("mode").add(new Option(mode, mode));
  }
  at("compare-label").hidden = !state.compare;
  if (!samplesListed) await listSamples();
}

async function listSamples() {
  const samples = await (await asked("page/samples")).json();
  samplesListed = true;
  at("samples").hidden = !samples.length;
  at("sample-list").replaceChildren(...samples.map(({name, attacked}) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name.replace(/(\.attacked)?\.[a-z]+$/i, attacked ? " (attacked)" : "");
    button.className = attacked ? "attacked" : "";
    button.addEventListener("click", async () => {
      try {
        const response = await asked(`page/samples/${encodeURIComponent(name)}`);
        await ask(new File([await response.blob()], name));
      } catch (error) {
        at("error").textContent = error.message;
        at("error").hidden = false;
      }
    });
    return button;
  }));
}

// ---- what people do -----------------------------------------------------------------------------------------------

at("file").addEventListener("change", () => ask(at("file").files[0]));
at("mode").addEventListener("change", () => ask(chosen));
at("compare").addEventListener("change", () => ask(chosen));
at("key").addEventListener("change", health);
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(chosen);
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", over);
    if (name === "drop") ask(event.dataTransfer.files[0]);
  });
}
health();
setInterval(() => { if (!document.hidden) health(); }, HEALTH_MS);
