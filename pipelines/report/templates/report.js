"use strict";
// Cards come with the page (glad report) or, some at a time, from its server (glad view).
const data = JSON.parse(document.getElementById("data").textContent);
document.getElementById("data").remove();
const byId = (id) => document.getElementById(id);
const form = byId("filters"), gallery = byId("gallery"), detail = byId("detail"), help = byId("help");
const PAGE = data.live ? 24 : 48;
const COLOURS = { good: "var(--bar)", correct: "var(--bar)", anomalous: "var(--bad)", hit: "var(--good)", miss: "var(--miss)", "false alarm": "var(--warn)" };
const short = (value) => value === null ? "–" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
const lastParts = (uri) => uri.split("/").slice(-2).join("/");
const stopReason = (reason) => data.stopReasons[reason] ?? reason;

// ---- plots ---------------------------------------------------------------------------------------------------------
const style = { background: "transparent", color: "var(--muted)", fontSize: "11px" };

function figure(id, describe, options) {
  const box = byId(id);
  if (!box) return;
  const draw = () => box.replaceChildren(Plot.plot({
    width: Math.max(200, box.clientWidth), height: 160, marginTop: 14, marginLeft: 40, marginBottom: 32, style, ariaLabel: describe, ...options }));
  draw();
  let waiting;
  new ResizeObserver(() => { clearTimeout(waiting); waiting = setTimeout(draw, 100); }).observe(box);
}

function legend(id, entries) {
  for (const [name, colour] of new Map(entries)) {
    const swatch = document.createElement("i");
    swatch.style.background = colour;
    byId(id).append(swatch, name);
  }
}

function drawPlots() {
  legend("legend", data.histogram.map((bin) => [bin.kind, COLOURS[bin.kind]]));
  const line = data.line === null ? [] : [data.line];
  figure("scores", `Histogram of ${data.total} image scores` + (line.length ? `; the threshold is ${short(data.line)}` : ""), {
    x: { label: data.unit }, y: { label: null, type: "sqrt", ticks: 4, tickFormat: "~s", grid: true },
    marks: [
      Plot.rectY(data.histogram, { x1: "from", x2: "to", y1: 0, y2: "count", fill: (bin) => COLOURS[bin.kind], fillOpacity: .85, insetLeft: .5, insetRight: .5,
        title: (bin) => `${bin.count} ${bin.kind}, ${short(bin.from)} to ${short(bin.to)}` }),
      Plot.ruleX(line, { stroke: "var(--ink)", strokeDasharray: "3 2" }),
      Plot.text(line, { x: (value) => value, text: () => "threshold", frameAnchor: "top", textAnchor: "start", dx: 5, fill: "var(--ink)" }),
    ] });
  const steps = data.steps.filter((bar) => bar.step !== null);
  const shade = (bar) => bar.reason === "difference" ? "var(--bad)" : "var(--bar)";
  legend("stops", steps.map((bar) => [stopReason(bar.reason), shade(bar)]));
  figure("steps", "Number of images that stopped at each denoising step", {
    x: { label: "denoising step; left: harder to repair", type: "band", reverse: true, tickFormat: String, padding: .2 }, y: { label: null, ticks: 4, tickFormat: "~s", grid: true },
    marks: [Plot.barY(steps, { x: "step", y: "count", fill: shade, fillOpacity: .85,
      title: (bar) => `${bar.count} at step ${bar.step}, ${stopReason(bar.reason)}` })] });
  for (const [id, x, y] of [["roc", "false positive rate", "true positive rate"], ["pro", "false positive rate", "defect overlap"]]) {
    const points = data.curves.flatMap((curve) => curve[id].map(([a, b]) => ({ a, b, category: curve.category })));
    const one = data.curves.length === 1;
    figure(id, `${id.toUpperCase()} curve of ${data.curves.map((curve) => curve.category).join(", ")}`, {
      x: { label: x, ticks: 4, domain: [0, id === "roc" ? 1 : .3] }, y: { label: null, ticks: 4, domain: [0, 1], grid: true },
      color: one ? undefined : { scheme: "tableau10" },
      marks: [Plot.line(points, { x: "a", y: "b", z: "category", stroke: one ? "var(--ink)" : "category", strokeWidth: 1.6, tip: !one, title: "category" })] });
  }
}

function stepCurve(card, width, height, axes) {
  if (!card.steps.length) return null;
  // A search compares steps out of order.
  const points = card.steps.map(([step, score]) => ({ step, score })).sort((a, b) => b.step - a.step);
  const stop = points.filter((point) => point.step === card.step);
  const text = `Difference from ${short(points[0].score)} at step ${points[0].step} to ${short(points.at(-1).score)} at step ${points.at(-1).step}; its limit is ${short(card.delta)}`;
  return Plot.plot({ width, height, style, ariaLabel: text,
    margin: 4, ...(axes ? { marginLeft: 48, marginBottom: 34, marginTop: 10, marginRight: 12 } : {}),
    x: { reverse: true, axis: axes ? "bottom" : null, label: "denoising step", domain: d3.extent(points, (point) => point.step), inset: 4 },
    y: { axis: axes ? "left" : null, label: null, ticks: 4, zero: true, grid: axes, domain: [0, Math.max(card.delta || 0, d3.max(points, (point) => point.score)) * 1.05 || 1] },
    marks: [
      Plot.ruleY(card.delta ? [card.delta] : [], { stroke: "var(--bad)", strokeDasharray: "3 2", strokeOpacity: .8 }),
      axes && card.delta ? Plot.text([card.delta], { y: (value) => value, text: () => "limit", frameAnchor: "right", dy: -7, fill: "var(--bad)" }) : null,
      Plot.lineY(points, { x: "step", y: "score", stroke: "var(--ink)", strokeWidth: 1.3 }),
      Plot.dot(axes ? points : [], { x: "step", y: "score", r: 2.2, fill: "var(--ink)", title: (point) => `${short(point.score)} at step ${point.step}` }),
      Plot.dot(stop, { x: "step", y: "score", r: 3.2, fill: card.reason === "difference" ? "var(--bad)" : "var(--muted)" }),
    ] });
}

// ---- cards ---------------------------------------------------------------------------------------------------------
function picture(card, source, heat) {
  const box = byId("picture").content.cloneNode(true).firstElementChild;
  box.style.aspectRatio = Math.min(2.5, Math.max(.5, (card.width || 1) / (card.height || 1)));
  const [photo, over] = box.querySelectorAll("img");
  if (source) {
    photo.src = source;
    photo.alt = `${source === card.reconstruction ? "Reconstruction of " : ""}${lastParts(card.uri)}` + (heat ? `, score ${short(card.score)}` : "");
  } else {
    photo.remove();
    if (!heat || card.problem) box.querySelector(".problem").textContent = `The image can no longer be read. ${card.problem || ""}`;
  }
  if (heat) {
    over.src = card.heat;
    for (const path of box.querySelectorAll("path")) path.setAttribute("d", card.contour);
    const tile = box.querySelector("rect"), [x, y, width, height] = card.box || [0, 0, 0, 0];
    if (card.box) for (const [name, value] of Object.entries({ x, y, width, height })) tile.setAttribute(name, value);
    else tile.remove();
  } else {
    over.remove();
    box.querySelector("svg").remove();
  }
  return box;
}

function badge(label, card) {
  const kind = card.truth || (!card.decided ? "undecided" : card.anomalous === null ? "" : card.anomalous ? "anomalous" : "good");
  label.textContent = card.mark ? card.mark.replace("_", " ") : kind;
  label.className = `badge ${(card.mark === "confirmed" ? "anomalous" : card.mark || kind).replace(/[_ ]/, "-")}`;
  label.hidden = !label.textContent;
}

const curvesInView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    curvesInView.unobserve(target);
    const drawn = stepCurve(target.card, Math.max(120, target.clientWidth - 20), 38, false);
    if (drawn) target.replaceChildren(drawn);
  }
}, { rootMargin: "300px" });

function element(card) {
  const node = byId("card").content.cloneNode(true).firstElementChild;
  node.card = card;
  node.classList.toggle("anomalous-card", card.anomalous === true);
  if (card.mark) node.classList.add(`marked-${card.mark}`);
  node.querySelector(".pictures").append(picture(card, card.input, true), ...(card.reconstruction ? [picture(card, card.reconstruction, false)] : []));
  node.querySelector(".name bdi").textContent = lastParts(card.uri);
  node.title = card.uri;
  badge(node.querySelector(".badge"), card);
  node.querySelector(".score").textContent = short(card.score);
  node.querySelector(".versus").textContent = card.versus;
  node.querySelector(".step").textContent = card.step === null ? stopReason(card.reason) : `step ${card.step} · ${stopReason(card.reason)}`;
  node.setAttribute("aria-label", `${lastParts(card.uri)}, score ${short(card.score)}, ${node.querySelector(".badge").textContent}`);
  const curve = node.querySelector(".curve");
  curve.hidden = node.querySelector(".curve-label").hidden = !card.steps.length;
  curve.card = card;
  curvesInView.observe(curve);
  return node;
}

// ---- filter, sort, page --------------------------------------------------------------------------------------------
const SORT = {
  margin: (a, b) => b.margin - a.margin, margin_up: (a, b) => a.margin - b.margin, step: (a, b) => (b.step ?? -1) - (a.step ?? -1),
  name: (a, b) => a.uri < b.uri ? -1 : 1, seconds: (a, b) => b.seconds - a.seconds };

async function query(filters, first) {
  if (data.live) {
    const parameters = new URLSearchParams({ ...filters, first, count: PAGE });
    const reply = await fetch(`api/cards?${parameters}`);
    if (!reply.ok) throw new Error((await reply.json().catch(() => ({}))).detail || reply.statusText);
    return reply.json();
  }
  const matches = matching(filters);
  return { total: matches.length, cards: matches.slice(first, first + PAGE) };
}

function matching(filters) {
  const text = (filters.text || "").toLowerCase();
  return data.cards.filter((card) =>
    (!text || card.uri.toLowerCase().includes(text)) && (!filters.category || card.category === filters.category) &&
    (!filters.verdict || card.decided && (card.anomalous === true) === (filters.verdict === "anomalous")) && (!filters.reason || card.reason === filters.reason) &&
    (!filters.truth || card.truth === filters.truth) && !(card.score < +filters.low) && (!filters.high || card.score <= +filters.high)).sort(SORT[filters.sort]);
}

let filters = {}, shown = [], total = 0, toReview = 0, reviewed = 0, search = 0, loading = false;

function busy(now) {
  byId("busy").hidden = !now;
  gallery.setAttribute("aria-busy", String(now));
}

function showReviewed() {
  byId("reviewed").textContent = data.live ? `· ${reviewed.toLocaleString("en")} of ${toReview.toLocaleString("en")} reviewed` : "";
}

// The same columns as `glad view` and `glad export --csv` write, as far as the page has them. A text never begins like a formula.
function table(cards) {
  const columns = { image: (card) => lastParts(card.uri), category: (card) => card.category, verdict: (card) => !card.decided ? "undecided" : card.anomalous === null ? "no threshold" : card.anomalous ? "anomalous" : "good",
    score: (card) => card.score, threshold: (card) => card.threshold, "score / threshold": (card) => card.ratio, "p-value": (card) => card.p, "ground truth": (card) => card.truth, doubt: (card) => card.doubt,
    "stopped at step": (card) => card.step, width: (card) => card.width, height: (card) => card.height, seconds: (card) => card.seconds, uri: (card) => card.uri, model: (card) => card.model, image_id: (card) => card.id };
  const cell = (value) => `"${(typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? "'" : "") + String(value ?? "").replaceAll('"', '""')}"`;
  const rows = [Object.keys(columns), ...cards.map((card) => Object.values(columns).map((column) => column(card)))];
  return "\ufeff" + rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}

byId("download").addEventListener("click", (event) => {
  if (data.live) {
    event.currentTarget.href = `api/verdicts.csv?${new URLSearchParams(filters)}`;
    return;
  }
  const url = URL.createObjectURL(new Blob([table(matching(filters))], { type: "text/csv" }));
  event.currentTarget.href = url;
  setTimeout(() => URL.revokeObjectURL(url), 60000);
});

async function more() {
  if (loading || (shown.length && shown.length >= total)) return;
  loading = true;
  const mySearch = search;
  byId("more").textContent = data.live ? "Loading…" : "";
  try {
    const reply = await query(filters, shown.length);
    if (mySearch !== search) return;
    total = reply.total;
    [toReview, reviewed] = [reply.to_review, reply.reviewed];
    showReviewed();
    if (!shown.length) {
      gallery.replaceChildren();
      const without = !reply.cards.some((card) => card.reconstruction);
      gallery.classList.toggle("single", without);
      byId("no-reconstructions").hidden = !without || !reply.cards.length || data.method === "nearest";
    }
    shown.push(...reply.cards);
    gallery.append(...reply.cards.map(element));
    const held = data.live ? data.total : data.cards.length;
    byId("count").textContent = total === held
      ? `${total.toLocaleString("en")} images` + (held < data.total ? `, the most anomalous of ${data.total.toLocaleString("en")}` : "")
      : `${total.toLocaleString("en")} of ${held.toLocaleString("en")} images`;
    byId("more").textContent = total ? "" : "No image matches. Widen the filter, or press Reset.";
  } catch (error) {
    byId("more").textContent = `The images could not be loaded: ${error.message}`;
  } finally {
    if (mySearch === search) {
      loading = false;
      busy(false);
    }
  }
  if (mySearch === search && byId("more").getBoundingClientRect().top < innerHeight + 400 && shown.length < total) more();
}

function start() {
  filters = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ""));
  [shown, total, loading] = [[], 0, false];
  search += 1;
  busy(true);
  more();
}

let typing;
form.addEventListener("input", (event) => {
  if (event.target.id === "opacity" || event.target.id === "contour") return;
  clearTimeout(typing);
  typing = setTimeout(start, event.target.tagName === "INPUT" ? 150 : 0);
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(() => { heat(65); document.body.classList.remove("no-contour"); start(); }));
byId("unfold").addEventListener("click", (event) => event.target.setAttribute("aria-expanded", String(form.classList.toggle("unfolded"))));
new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting) && shown.length) more(); }, { rootMargin: "600px" }).observe(byId("more"));

// ---- heat map, theme, detail, keys ---------------------------------------------------------------------------------
let before = 65;
function heat(value) {
  byId("opacity").value = Math.min(100, Math.max(0, value));
  document.documentElement.style.setProperty("--heat", byId("opacity").value / 100);
}
byId("opacity").addEventListener("input", (event) => heat(+event.target.value));
byId("contour").addEventListener("change", (event) => document.body.classList.toggle("no-contour", !event.target.checked));
byId("print").addEventListener("click", () => print());
byId("help-button").addEventListener("click", () => help.showModal());
byId("theme").addEventListener("click", (event) => {
  const next = { auto: "light", light: "dark", dark: "auto" }[document.documentElement.dataset.theme || "auto"];
  document.documentElement.dataset.theme = next;
  event.target.textContent = `Theme: ${next}`;
});

let current = -1;
const note = detail.querySelector("[name=note]");
function open(index, message = "") {
  if (index < 0 || index >= shown.length) return;
  current = index;
  const card = shown[index];
  detail.querySelector("h2").textContent = lastParts(card.uri);
  detail.querySelector(".path").textContent = card.uri;
  const panels = [["Input", card.input, false], ...(card.reconstruction ? [["Reconstruction", card.reconstruction, false]] : []), ["Heat map", card.input, true],
    ...(card.tile ? [[`The most anomalous of ${card.tiles} tiles`, card.tile, false]] : [])];
  detail.querySelector(".panels").replaceChildren(...panels.map(([caption, source, hot]) => {
    const panel = document.createElement("figure"), text = document.createElement("figcaption");
    text.textContent = caption;
    panel.append(text, picture(card, source, hot));
    return panel;
  }));
  const facts = { verdict: card.truth || (!card.decided ? "undecided" : card.anomalous === null ? null : card.anomalous ? "anomalous" : "good"), score: short(card.score), threshold: short(card.threshold), "compared with it": card.versus, doubt: card.doubt, category: card.category, size: `${card.width} × ${card.height}` };
  const method = { "p-value": card.p === null ? null : short(card.p), "stopped at step": card.step ?? "none", "stop reason": stopReason(card.reason), "model time": `${short(card.seconds)} s`, model: card.model, id: card.id };
  for (const [list, entries] of [[".facts-of-one", facts], ["details dl", method]]) {
    detail.querySelector(list).replaceChildren(...Object.entries(entries).filter(([, value]) => value).flatMap(([name, value]) => {
      const [term, definition] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, definition.textContent] = [name, value];
      return [term, definition];
    }));
  }
  detail.querySelector(".prev").disabled = index === 0;
  detail.querySelector(".next").disabled = index === shown.length - 1;
  detail.querySelector(".marks").hidden = !data.live;
  showMark(card, message);
  note.value = card.note || "";
  if (!detail.open) detail.showModal();
  const curve = detail.querySelector(".below figure"), drawn = stepCurve(card, Math.min(640, Math.max(240, detail.clientWidth - 60)), 180, true);
  curve.hidden = !drawn;
  curve.querySelector(".curve").replaceChildren(...(drawn ? [drawn] : []));
  if (index > shown.length - 5) more();
}

function showMark(card, message) {
  for (const button of detail.querySelectorAll("[data-mark]")) button.setAttribute("aria-pressed", String((card.mark || "") === button.dataset.mark && !!card.mark));
  detail.querySelector(".marks [role]").textContent = message;
}

const made = []; // marks of this visit, for undo: the card, what it had before, where it was

async function save(card, verdict, text) {
  const reply = await fetch("api/marks", { method: "POST", headers: { "content-type": "application/json" },
    body: JSON.stringify({ file: card.file, image_id: card.id, verdict: verdict || null, note: text || "" }) }).catch((error) => ({ ok: false, statusText: error.message, json: async () => ({}) }));
  if (!reply.ok) {
    const reason = (await reply.json().catch(() => ({}))).detail || reply.statusText;
    return `Not saved: ${typeof reason === "string" ? reason : JSON.stringify(reason)}`;
  }
  reviewed += Number(!!verdict) - Number(!!card.mark);
  [card.mark, card.note] = [verdict || null, verdict ? text : ""];
  showReviewed();
  const node = gallery.children[shown.indexOf(card)];
  if (node) {
    node.classList.remove("marked-confirmed", "marked-false_alarm");
    if (verdict) node.classList.add(`marked-${verdict}`);
    badge(node.querySelector(".badge"), card);
  }
  return "";
}

// After a mark the next image comes, in the dialog as among the cards; a mark taken back stays where it is.
async function mark(index, verdict) {
  const card = shown[index];
  if (!data.live || !card) return;
  const before = { card, mark: card.mark, note: card.note };
  const problem = await save(card, verdict, detail.open ? note.value : card.note);
  if (!problem) made.push(before);
  detail.querySelector(".undo").disabled = !made.length;
  const message = problem || `${lastParts(card.uri)}: ${verdict ? verdict.replace("_", " ") : "taken back"}`;
  const next = problem || !verdict || index + 1 >= shown.length ? index : index + 1;
  if (detail.open) {
    if (current === index) open(next, message);
  } else {
    byId("reviewed").title = message;
    if (problem) alert(message);
    else gallery.children[next].focus();
  }
}

async function undo() {
  const last = made.at(-1);
  if (!last) return;
  const problem = await save(last.card, last.mark, last.note);
  if (!problem) made.pop();
  detail.querySelector(".undo").disabled = !made.length;
  const index = shown.indexOf(last.card);
  if (detail.open && index >= 0) open(index, problem || `${lastParts(last.card.uri)}: undone`);
  else gallery.children[index]?.focus();
}

note.addEventListener("change", async () => {
  const card = shown[current];
  if (card.mark) showMark(card, await save(card, card.mark, note.value) || "Note saved");
});
detail.querySelector(".undo").addEventListener("click", undo);

gallery.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (card) open([...gallery.children].indexOf(card));
});
detail.querySelector(".prev").addEventListener("click", () => open(current - 1));
detail.querySelector(".next").addEventListener("click", () => open(current + 1));
detail.querySelector(".close").addEventListener("click", () => detail.close());
detail.addEventListener("click", (event) => { if (event.target === detail) detail.close(); });
detail.addEventListener("close", () => gallery.children[current]?.focus());
for (const button of detail.querySelectorAll("[data-mark]")) button.addEventListener("click", () => mark(current, button.dataset.mark));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.matches("input:not([type=range], [type=checkbox]), select")) {
    if (event.key === "Escape" || event.key === "Enter" && event.target === note) {
      event.target.blur();
      event.preventDefault();
    }
    return;
  }
  const focused = [...gallery.children].indexOf(document.activeElement);
  const columns = getComputedStyle(gallery).gridTemplateColumns.split(" ").length;
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  if (event.key in moves && !event.target.matches("input")) {
    if (detail.open) {
      open(current + Math.sign(moves[event.key]));
    } else if (focused >= 0) {
      gallery.children[Math.min(gallery.children.length - 1, Math.max(0, focused + moves[event.key]))].focus();
    } else if (event.key === "ArrowRight") {
      gallery.children[0]?.focus();
    } else {
      return;
    }
  } else if ((event.key === "Enter" || event.key === " ") && focused >= 0 && !detail.open) open(focused);
  else if (event.key === "/" && !detail.open) form.elements.text.focus();
  else if (event.key === "?") help.showModal();
  else if (event.key === "h") {
    const now = +byId("opacity").value;
    if (now) before = now;
    heat(now ? 0 : before);
  } else if (event.key === "[" || event.key === "]") heat(+byId("opacity").value + (event.key === "]" ? 10 : -10));
  else if (event.key === "c" || event.key === "f") mark(detail.open ? current : focused, event.key === "c" ? "confirmed" : "false_alarm");
  else if (event.key === "u") undo();
  else return;
  event.preventDefault();
});

if (matchMedia("(max-width: 760px)").matches) byId("charts").open = false;
drawPlots();
start();
document.documentElement.dataset.ready = "yes";
