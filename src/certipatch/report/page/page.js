"use strict";
// Draws what can be stepped through from the JSON of the page. Text of unknown origin is only ever set as text.
const { pictures, runs, cases, outcomes } = JSON.parse(document.getElementById("data").textContent);
const STATE = ["certified", "missed", "hopeless", "unreadable"];
const SIGN = ["✓", "≈", "✗", "?"];
const PAGE = matchMedia("(max-width: 34rem)").matches ? 8 : 25; // rows of the list of all images
const by = (id) => document.getElementById(id);
let run, chosen = [], from = 0, viewed = null;

function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}
function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
const cell = (name, number) => make("td", { class: "n", "data-label": name }, number === null ? "–" : `${number}`);
const nameOf = (label) => (label === null ? "nothing" : run.classes[label] ?? String(label));
const stateOf = (at) => run.images.outcome[at];
const pairText = ([i, j]) => (i === j ? `mask ${i + 1}` : `masks ${i + 1}, ${j + 1}`);
const source = (at) => pictures[run.picture[at]];

// The image at a place of the records, with masks over it.
function plane(element, at, masks) {
  const [height, width] = run.size;
  element.style.aspectRatio = `${width} / ${height}`;
  element.classList.toggle("pixelated", Math.max(height, width) <= 96);
  element.replaceChildren();
  const address = at === null ? undefined : source(at);
  if (address) {
    const image = make("img", { src: address, alt: "" });
    element.append(image);
  }
  for (const mask of new Set(masks)) {
    for (const [top, left, h, w] of run.masks[mask]) {
      const window = make("i");
      Object.assign(window.style, { top: `${100 * top / height}%`, left: `${100 * left / width}%`, height: `${100 * h / height}%`, width: `${100 * w / width}%`, background: run.fill });
      element.append(window);
    }
  }
}

// --- Where it fails
function where() {
  const n = run.images.label.length;
  const none = run.failing === 0;
  by("where").hidden = none;
  by("failing").textContent = none
    ? "No image fails: there is no wrong view in the records."
    : `On ${run.failing} of ${n} images some view is wrong; the records name one pair of masks for each, the first that was found. ${run.pairs.length < 2 ? "" : "Choose a pair to see it."}`;
  if (none) return;
  const { rows, columns, counts } = run.heat;
  const most = Math.max(1, ...counts.flat());
  const example = run.gallery["just missed"].concat(run.gallery.hopeless).find((at) => source(at)) ?? null;
  plane(by("heat"), example, []);
  by("heat").classList.add("heated");
  const drawing = svg("svg", { viewBox: `0 0 ${run.size[1]} ${run.size[0]}`, preserveAspectRatio: "none", role: "img", "aria-label": "heat map of failing masks; the list beside it has the numbers" });
  counts.forEach((line, r) => line.forEach((count, c) => {
    const cell = svg("rect", { class: "cell", x: columns[c], y: rows[r], width: columns[c + 1] - columns[c], height: rows[r + 1] - rows[r], style: `fill: rgba(var(--heat), ${(0.04 + 0.88 * count / most).toFixed(3)})` });
    const title = svg("title", {});
    title.textContent = `hidden in ${count} of ${run.failing} failures`;
    cell.append(title);
    const covers = ([i, j]) => [...run.masks[i], ...run.masks[j]].some(([top, left, h, w]) => top <= rows[r] && rows[r] < top + h && left <= columns[c] && columns[c] < left + w);
    cell.addEventListener("pointerenter", () => { const pair = run.pairs.findIndex(covers); if (pair >= 0) show(pair); });
    drawing.append(cell);
  }));
  by("heat").append(drawing);
  by("ramp").textContent = `0 to ${most} of ${run.failing} failures`;
  by("pairs").replaceChildren(...run.pairs.map(([i, j, count], number) => {
    const rod = make("span", { class: "rod" }, make("span"));
    rod.firstChild.style.width = `${100 * count / run.pairs[0][2]}%`;
    const button = make("button", { type: "button" }, i === j ? `mask ${i + 1}` : `${i + 1} and ${j + 1}`, rod, `${count}`);
    button.setAttribute("aria-label", `${pairText([i, j])}: ${count} images`);
    for (const event of ["pointerenter", "focus", "click"]) button.addEventListener(event, () => show(number));
    return make("li", {}, button);
  }));
  show(0);
}
function show(number) {
  const [i, j, count] = run.pairs[number];
  by("pairs").querySelectorAll("button").forEach((button, n) => button.setAttribute("aria-pressed", n === number));
  const failing = run.images.pair.map((pair, at) => (pair && pair[0] === i && pair[1] === j ? at : -1)).filter((at) => at >= 0);
  const at = failing.find((one) => source(one)) ?? null;
  const stand = at ?? run.gallery["just missed"].concat(run.gallery.hopeless).find((one) => source(one)) ?? null;
  plane(by("masked"), stand, [i, j]);
  const classes = [...new Set(failing.map((one) => nameOf(run.images.label[one])))];
  by("masked-what").textContent = at !== null
    ? `${pairText([i, j])} over “${nameOf(run.images.label[at])}”, which is then read as “${nameOf(run.images.fails[at])}”. ${count} images fail here.`
    : `${pairText([i, j])}${stand === null ? "" : " (over another image)"}. ${count} images fail here, of ${classes.length} ${classes.length === 1 ? "class" : "classes"}.`;
}

// --- Classes
function classes() {
  by("classes").replaceChildren(...run.hardest.map((one) => {
    const percent = 100 * one.certified / one.images;
    const bar = svg("svg", { class: "bar certified", viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" });
    bar.append(svg("rect", { class: "track", width: 100, height: 12 }), svg("rect", { class: "value", width: percent, height: 12 }), svg("rect", { class: "interval", x: 100 * one.interval[0], y: 5, width: Math.max(0.4, 100 * (one.interval[1] - one.interval[0])), height: 2 }));
    return make("tr", {}, make("th", { scope: "row", class: "name" }, nameOf(one.label)), cell("images", one.images), cell("vanilla", one.vanilla), cell("clean", one.clean),
      make("td", { "data-label": "certified robust" }, make("b", {}, `${percent.toFixed(1)} %`), " ", make("span", { class: "fraction" }, `${one.certified}/${one.images}; ${(100 * one.interval[0]).toFixed(1)}–${(100 * one.interval[1]).toFixed(1)}`), bar),
      make("td", { "data-label": "read instead" }, one.wrong.map(([label, count]) => `${nameOf(label)} (${count})`).join(", ") || "–"));
  }));
  by("classes-more").textContent = run.allClasses > run.hardest.length ? `The ${run.hardest.length} least certified of ${run.allClasses} classes that have images.` : "";
}

// --- Gallery
const MEANS = {
  "certified": "Certified: right under every pair of masks (those with the smallest margins)",
  "just missed": "Just missed: right under every single mask, wrong under some pair (those that withstood the most views)",
  "hopeless": "Hopeless: wrong under a single mask, or without any (of as many classes as there are)",
};
function gallery() {
  by("gallery").replaceChildren(...Object.entries(run.gallery).filter(([, some]) => some.length).map(([name, some]) => {
    const cards = make("div", { class: "cards" }, ...some.map((at) => {
      const picture = make("span", { class: "plane" });
      plane(picture, at, run.images.pair[at] ?? []);
      const card = make("button", { type: "button", class: `card ${STATE[stateOf(at)]}` }, picture, make("span", { class: "text" }, ...short(at)));
      card.addEventListener("click", () => view(at, some));
      return card;
    }));
    const total = run.images.outcome.filter((state) => outcomes[state] === name).length;
    return make("div", { class: `group ${STATE[outcomes.indexOf(name)]}` }, make("h3", {}, `${MEANS[name]}: ${some.length} of ${total}`), cards);
  }));
}
function short(at) {
  const { label, fails, vanilla, margin } = run.images;
  const truth = make("b", {}, nameOf(label[at]));
  if (stateOf(at) === 0) return [truth, make("br"), `✓ margin ${margin[at]}`];
  if (stateOf(at) === 3) return [truth, make("br"), "unreadable"];
  const what = fails[at] === null ? `✓ but margin ${margin[at]}` : `✗ reads ${nameOf(fails[at])}`;
  return [truth, make("br"), what, ...(vanilla[at] !== label[at] ? [make("br"), `without a mask: ${nameOf(vanilla[at])}`] : [])];
}

// --- All images
function filter() {
  const text = by("text").value.trim().toLowerCase(), state = by("outcome").value, { name, label, outcome } = run.images;
  chosen = name.map((_, at) => at).filter((at) => (state === "" || outcome[at] === Number(state)) && (!text || name[at].toLowerCase().includes(text) || nameOf(label[at]).toLowerCase().includes(text)));
  from = 0;
  list();
}
function list() {
  const { index, name, label, fails, pair, margin, passes, outcome } = run.images;
  by("count").textContent = chosen.length ? `${from + 1}–${Math.min(from + PAGE, chosen.length)} of ${chosen.length} images` : "no image matches";
  by("back").disabled = from === 0;
  by("on").disabled = from + PAGE >= chosen.length;
  by("rows").replaceChildren(...chosen.slice(from, from + PAGE).map((at) => {
    const open = make("button", { type: "button" }, name[at]);
    const row = make("tr", {}, cell("nr", index[at]), make("td", { "data-label": "image" }, open), make("td", { "data-label": "class" }, nameOf(label[at])),
      make("td", { "data-label": "outcome", class: `state ${STATE[outcome[at]]}` }, `${SIGN[outcome[at]]} ${outcomes[outcome[at]]}`),
      make("td", { "data-label": "read wrongly as" }, fails[at] === null ? "–" : nameOf(fails[at])), make("td", { "data-label": "under" }, pair[at] ? pairText(pair[at]) : "–"), cell("smallest margin", margin[at]), cell("passes", passes[at]));
    row.addEventListener("click", () => view(at, chosen));
    return row;
  }));
}

// --- One image, mask by mask
function view(at, among) {
  viewed = { at, among };
  const pair = run.images.pair[at];
  for (const id of ["first", "second"]) by(id).max = run.masks.length;
  by("first").value = pair ? pair[0] + 1 : 0;
  by("second").value = pair && pair[1] !== pair[0] ? pair[1] + 1 : 0;
  by("to-failing").disabled = !pair;
  const { name, label, vanilla, defended, outcome, margin, passes, error } = run.images;
  by("viewer-title").textContent = `${SIGN[outcome[at]]} ${nameOf(label[at])}: ${outcomes[outcome[at]]}`;
  const kind = run.images.case[at];
  const facts = [["image", name[at]], ["true class", nameOf(label[at])], ["undefended, no patch", nameOf(vanilla[at])], ["defended, no patch", `${nameOf(defended[at])}${kind === null ? "" : ` (${cases[kind]})`}`],
    ["failing", pair ? `${pairText(pair)}: reads ${nameOf(run.images.fails[at])}` : "none found"], ["smallest margin", margin[at] === null ? "–" : `${margin[at]} over the views that were computed`], ["passes", `${passes[at]}`]];
  if (error[at]) facts.push(["unreadable", error[at]]);
  by("viewer-facts").replaceChildren(...facts.flatMap(([what, value]) => [make("dt", {}, what), make("dd", {}, value)]));
  const place = among.indexOf(at);
  by("image-back").disabled = place <= 0;
  by("image-on").disabled = place < 0 || place + 1 >= among.length;
  step();
  if (!by("viewer").open) by("viewer").showModal();
}
function step() {
  const { at } = viewed, masks = [by("first"), by("second")].map((slider) => Number(slider.value) - 1).filter((mask) => mask >= 0);
  plane(by("viewer-plane"), at, masks);
  by("first-of").textContent = by("first").value === "0" ? "none" : `${by("first").value} of ${run.masks.length}`;
  by("second-of").textContent = by("second").value === "0" ? "none" : `${by("second").value} of ${run.masks.length}`;
  const [i, j] = [Math.min(...masks), Math.max(...masks)], { pair, fails, label, vanilla, outcome } = run.images;
  const answer = !masks.length ? nameOf(vanilla[at])
    : pair[at] && pair[at][0] === i && pair[at][1] === j ? nameOf(fails[at])
    : outcome[at] === 0 || (outcome[at] === 1 && (i === j || pair[at] === null)) ? nameOf(label[at]) : null;
  by("viewer-what").textContent = (source(at) ? "" : "This picture is not in the page; the masks are drawn without it. ")
    + `${masks.length ? `Under ${pairText([i, j])}` : "Without a mask"} the model reads: ` + (answer === null ? "not in the records." : `${answer}${answer === nameOf(label[at]) ? " ✓" : " ✗"}`);
}
function go(by_) {
  const place = viewed.among.indexOf(viewed.at) + by_;
  if (place >= 0 && place < viewed.among.length) view(viewed.among[place], viewed.among);
}
// All pairs in the order (1), (1, 2), (1, 3) ... as the sliders have them; the first of all is no mask.
function walk(by_) {
  const n = run.masks.length;
  let first = Number(by("first").value), second = Number(by("second").value);
  if (second !== 0 && second < first) [first, second] = [second, first];
  if (by_ > 0) {
    if (first === 0) { first = second || 1; second = 0; }
    else if (second === 0) second = first + 1;
    else second += 1;
    if (second > n) { first += 1; second = 0; }
    if (first > n) first = second = 0;
  } else if (first === 0) { first = n; second = 0; }
  else if (second === 0) { first -= 1; second = first === 0 || first === n ? 0 : n; }
  else second = second - 1 > first ? second - 1 : 0;
  by("first").value = first;
  by("second").value = second;
  step();
}

function choose(number) {
  run = runs[number];
  where();
  classes();
  gallery();
  filter();
}
if (runs.length) {
  by("explore").hidden = false;
  choose(0);
  by("run").addEventListener("change", () => choose(Number(by("run").value)));
  for (const id of ["text", "outcome"]) by(id).addEventListener("input", filter);
  by("filters").addEventListener("submit", (event) => event.preventDefault());
  by("back").addEventListener("click", () => { from = Math.max(0, from - PAGE); list(); });
  by("on").addEventListener("click", () => { from += PAGE; list(); });
  for (const id of ["first", "second"]) by(id).addEventListener("input", step);
  by("to-failing").addEventListener("click", () => view(viewed.at, viewed.among));
  by("to-none").addEventListener("click", () => { by("first").value = by("second").value = 0; step(); });
  by("step").addEventListener("click", () => walk(1));
  by("step-back").addEventListener("click", () => walk(-1));
  by("image-back").addEventListener("click", () => go(-1));
  by("image-on").addEventListener("click", () => go(1));
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
