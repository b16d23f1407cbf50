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
const count = (n, one, many) => `${n} ${n === 1 ? one : many}`;
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
  const wrong = run.images.vanilla.filter((label, at) => label !== null && label !== run.images.label[at]).length;
  by("failing").textContent = (none ? "No image that is right without a mask fails: the records hold no wrong view of one. "
    : `${run.failing} of ${n} images are right without a mask and wrong under some. The records name one failing pair of masks for each, the first that was found; choose one to see it. `)
    + (wrong ? `${count(wrong, "image is", "images are")} wrong without any mask.` : "");
  if (none) return;
  const { rows, columns, counts } = run.heat;
  const most = Math.max(1, ...counts.flat());
  plane(by("heat"), null, []);
  by("heat").classList.add("heated");
  const drawing = svg("svg", { viewBox: `0 0 ${run.size[1]} ${run.size[0]}`, preserveAspectRatio: "none", role: "img", "aria-label": "heat map of the failing masks of all images" });
  counts.forEach((line, r) => line.forEach((hidden, c) => {
    const cell = svg("rect", { class: "cell", x: columns[c], y: rows[r], width: columns[c + 1] - columns[c], height: rows[r + 1] - rows[r], style: `fill: rgba(var(--heat), ${(0.04 + 0.88 * hidden / most).toFixed(3)})` });
    const title = svg("title", {});
    title.textContent = `under the failing masks of ${count(hidden, "image", "images")}`;
    cell.append(title);
    const covers = ([i, j]) => [...run.masks[i], ...run.masks[j]].some(([top, left, h, w]) => top <= rows[r] && rows[r] < top + h && left <= columns[c] && columns[c] < left + w);
    cell.addEventListener("pointerenter", () => { const pair = run.pairs.findIndex(covers); if (pair >= 0) show(pair); });
    drawing.append(cell);
  }));
  by("heat").append(drawing);
  by("ramp").textContent = `0 to ${most} of ${run.failing} images`;
  by("pairs").replaceChildren(...run.pairs.map(([i, j, images], number) => {
    const rod = make("span", { class: "rod" }, make("span"));
    rod.firstChild.style.width = `${100 * images / Math.max(8, run.pairs[0][2])}%`;
    const button = make("button", { type: "button" }, i === j ? `mask ${i + 1}` : `${i + 1} and ${j + 1}`, rod, `${images}`);
    button.setAttribute("aria-label", `${pairText([i, j])}: ${count(images, "image", "images")}`);
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => show(number));
    button.addEventListener("click", () => { const among = failingUnder(i, j); view(among.find(source) ?? among[0], among); });
    return make("li", {}, button);
  }));
  by("pairs-more").textContent = `${count(run.allPairs, "pair is", "different pairs are")} named, ${run.once} of them for one image only. Choose one to step through its images.`;
  show(0);
}
const failingUnder = (i, j) => run.images.pair.map((pair, at) => (pair && pair[0] === i && pair[1] === j && run.images.vanilla[at] === run.images.label[at] ? at : -1)).filter((at) => at >= 0);
function show(number) {
  const [i, j] = run.pairs[number], failing = failingUnder(i, j);
  by("pairs").querySelectorAll("button").forEach((button, n) => button.setAttribute("aria-pressed", n === number));
  const at = failing.find((one) => source(one)) ?? failing[0];
  plane(by("masked"), at, [i, j]);
  by("masked-what").textContent = `${pairText([i, j])} over “${nameOf(run.images.label[at])}”${source(at) ? "" : " (its picture is not in the page)"}, which is then read as “${nameOf(run.images.fails[at])}”. Named first for ${count(failing.length, "image", "images")}.`;
}

// --- Where a sticker can do nothing: the places of the centre of a patch, drawn as one path for each kind of place.
function placesOver(element, shade) {
  const drawing = svg("svg", { viewBox: `0 0 ${run.size[1]} ${run.size[0]}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const paths = new Map();
  for (const [top, left, h, w, kind] of run.places.cells) {
    const look = JSON.stringify(shade(kind));
    paths.set(look, `${paths.get(look) ?? ""}M${left} ${top}h${w}v${h}h${-w}z`);
  }
  for (const [look, d] of paths) drawing.append(svg("path", { ...JSON.parse(look), d }));
  element.append(drawing);
}
function mapOver(element, at) {
  const proven = run.places.hidden.map((masks) => masks.some((mask) => run.places.proven[at][mask] === "1"));
  placesOver(element, (kind) => ({ class: proven[kind] ? "proven" : "unproven" }));
}
const percentOf = (share) => (share > 0.9995 && share < 1 ? ">99.9 %" : share > 0 && share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`);
function places() {
  if (!by("places")) return;
  const found = run.places;
  by("places-maps").hidden = !found;
  if (!found) { by("places-what").textContent = "There is no map of this run: it was not certified by place (certify --places), or it is against two patches, whose pairs of places have no picture."; return; }
  const everywhere = found.share.filter((share) => share === 1).length, nowhere = found.share.filter((share) => share === 0).length;
  by("places-what").textContent = `${everywhere} of ${found.share.length} images are proven at every place, ${found.share.length - everywhere - nowhere} at some and ${nowhere} at none.`;
  plane(by("places-mean"), null, []);
  by("places-mean").classList.add("heated");
  const [low, high] = [Math.min(...found.mean), Math.max(...found.mean)];
  placesOver(by("places-mean"), (kind) => ({ style: `fill: rgba(var(--green), ${(0.06 + 0.9 * (high > low ? (found.mean[kind] - low) / (high - low) : 1)).toFixed(3)})` }));
  by("places-mean").querySelector("svg").setAttribute("role", "img");
  by("places-mean").querySelector("svg").removeAttribute("aria-hidden");
  by("places-mean").querySelector("svg").setAttribute("aria-label", `map of the share of images proven at each place, from ${percentOf(low)} to ${percentOf(high)}`);
  by("places-ramp").textContent = `${percentOf(low)} to ${percentOf(high)} of ${found.share.length} images`;
  const some = found.share.map((_, at) => at).filter((at) => found.share[at] < 1 && run.images.error[at] === undefined && source(at));
  some.sort((a, b) => found.share[b] - found.share[a]);
  const shown = some.length <= 12 ? some : Array.from({ length: 12 }, (_, n) => some[Math.round((n * (some.length - 1)) / 11)]);
  by("places-cards").replaceChildren(...shown.map((at) => {
    const picture = make("span", { class: "plane" });
    plane(picture, at, []);
    mapOver(picture, at);
    const card = make("button", { type: "button", class: "card" }, picture, make("span", { class: "text" }, make("b", {}, nameOf(run.images.label[at])), make("br"), `${percentOf(found.share[at])} of places`));
    card.addEventListener("click", () => { by("viewer-map").checked = true; view(at, shown); });
    return card;
  }));
  if (!shown.length) by("places-cards").textContent = some.length || everywhere < found.share.length ? "Their pictures are not in the page; the list of all images has their shares." : "Every image has a certificate.";
}

// --- Classes
function classes() {
  by("classes").replaceChildren(...run.hardest.map((one) => {
    const percent = 100 * one.certified / one.images;
    const bar = svg("svg", { class: "bar certified", viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" });
    bar.append(svg("rect", { class: "track", width: 100, height: 12 }), svg("rect", { class: "value", width: percent, height: 12 }), svg("rect", { class: "interval", x: 100 * one.interval[0], y: 5, width: Math.max(0.4, 100 * (one.interval[1] - one.interval[0])), height: 2 }));
    return make("tr", {}, make("th", { scope: "row", class: "name" }, nameOf(one.label)), cell("images", one.images), cell("vanilla", one.vanilla), cell("clean", one.clean),
      make("td", { "data-label": "certified robust" }, make("b", {}, `${percent.toFixed(1)} %`), " ", make("span", { class: "fraction" }, `${one.certified}/${one.images}; ${(100 * one.interval[0]).toFixed(1)}–${(100 * one.interval[1]).toFixed(1)}`), bar),
      make("td", { "data-label": "read instead" }, [...one.wrong.map(([label, images]) => `${nameOf(label)} (${images})`), ...(one.others ? [count(one.others, "other", "others")] : [])].join(", ") || "–"));
  }));
  by("classes-more").textContent = run.allClasses > run.hardest.length ? `The ${run.hardest.length} least certified of ${run.allClasses} classes that have images. ` : "";
  if (run.images.label.length < 5 * run.allClasses) by("classes-more").textContent += "Fewer than five images a class: these shares say little about a class.";
}

// --- Gallery
const MEANS = {
  "certified": "Certified: right under every mask and every pair (here: those with the smallest margins)",
  "just missed": "Just missed: right under every single mask, wrong under some pair (here: those whose wrong pair was found last)",
  "hopeless": "Hopeless: some single mask is enough for a wrong answer, or none is needed (here: one of each class where possible)",
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
  if (stateOf(at) === 0) return [truth, make("br"), margin[at] === null ? "✓ certified" : `✓ margin ${margin[at]}`];
  if (stateOf(at) === 3) return [truth, make("br"), "unreadable"];
  const what = fails[at] === null ? (margin[at] === null ? "✓ but not proven" : `✓ but margin ${margin[at]}`) : `✗ reads ${nameOf(fails[at])}`;
  return [truth, make("br"), what, ...(vanilla[at] !== label[at] ? [make("br"), `without a mask: ${nameOf(vanilla[at])}`] : [])];
}

// --- All images
function filter() {
  const text = by("text").value.trim().toLowerCase(), state = by("outcome").value, of = by("class").value, { name, label, outcome } = run.images;
  chosen = name.map((_, at) => at).filter((at) => (state === "" || outcome[at] === Number(state)) && (of === "" || label[at] === Number(of)) && (!text || name[at].toLowerCase().includes(text)));
  from = 0;
  list();
}
// What an image is read as, and under which masks: without any, if it is wrong already.
const bare = (at) => run.images.vanilla[at] !== null && run.images.vanilla[at] !== run.images.label[at];
const wrongly = (at) => (bare(at) ? run.images.vanilla[at] : run.images.fails[at]);
const under = (at) => (bare(at) ? "no mask needed" : run.images.pair[at] ? pairText(run.images.pair[at]) : "–");
function list() {
  const { index, name, label, margin, passes, outcome } = run.images;
  by("count").textContent = chosen.length ? `${from + 1}–${Math.min(from + PAGE, chosen.length)} of ${chosen.length} images` : "no image matches";
  by("back").disabled = from === 0;
  by("on").disabled = from + PAGE >= chosen.length;
  by("rows").replaceChildren(...chosen.slice(from, from + PAGE).map((at) => {
    const open = make("button", { type: "button" }, name[at]);
    const row = make("tr", {}, cell("nr", index[at]), make("td", { "data-label": "image" }, open), make("td", { "data-label": "class" }, nameOf(label[at])),
      make("td", { "data-label": "outcome", class: `state ${STATE[outcome[at]]}` }, `${SIGN[outcome[at]]} ${outcomes[outcome[at]]}`),
      make("td", { "data-label": "read wrongly as" }, wrongly(at) === null ? "–" : nameOf(wrongly(at))), make("td", { "data-label": "under" }, under(at)), cell("margin", margin[at]), cell("passes", passes[at]));
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
    ["failing", bare(at) ? "without any mask" : pair ? `${pairText(pair)}: reads ${nameOf(run.images.fails[at])}` : "none found"], ["passes", `${passes[at]}`]];
  if (run.places) facts.push(["proven places", percentOf(run.places.share[at])]);
  if (margin[at] !== null) facts.push(["smallest margin", `${margin[at]}, over all views`]);
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
  if (by("viewer-map")) {
    by("viewer-map-choice").hidden = !run.places;
    if (run.places && by("viewer-map").checked) mapOver(by("viewer-plane"), at);
  }
  by("first-of").textContent = by("first").value === "0" ? "none" : `${by("first").value} of ${run.masks.length}`;
  by("second-of").textContent = by("second").value === "0" ? "none" : `${by("second").value} of ${run.masks.length}`;
  const [i, j] = [Math.min(...masks), Math.max(...masks)], { pair, fails, label, vanilla, outcome } = run.images;
  const answer = !masks.length ? nameOf(vanilla[at])
    : pair[at] && pair[at][0] === i && pair[at][1] === j ? nameOf(fails[at])
    : outcome[at] === 0 || (outcome[at] === 1 && (i === j || pair[at] === null)) ? nameOf(label[at]) : null;
  by("viewer-what").textContent = (source(at) ? "" : "This picture is not in the page; the masks are drawn without it. ")
    + `${masks.length ? `Under ${pairText([i, j])}` : "Without a mask"} the model reads: ` + (answer === null ? "not in the records. Certification stops at the first wrong pair, and records name that one." : `${answer}${answer === nameOf(label[at]) ? " ✓" : " ✗"}`);
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
  if (runs.length > 1) document.querySelectorAll(".of").forEach((of) => { of.textContent = `: ${run.name}`; });
  const labels = [...new Set(run.images.label)].sort((a, b) => a - b);
  by("class").replaceChildren(make("option", { value: "" }, "all"), ...labels.map((label) => make("option", { value: `${label}` }, nameOf(label))));
  where();
  places();
  classes();
  gallery();
  filter();
}
if (runs.length) {
  by("explore").hidden = false;
  choose(0);
  by("run").addEventListener("change", () => choose(Number(by("run").value)));
  for (const id of ["text", "class", "outcome"]) by(id).addEventListener("input", filter);
  by("filters").addEventListener("submit", (event) => event.preventDefault());
  by("back").addEventListener("click", () => { from = Math.max(0, from - PAGE); list(); });
  by("on").addEventListener("click", () => { from += PAGE; list(); });
  for (const id of ["first", "second"]) by(id).addEventListener("input", step);
  by("viewer-map")?.addEventListener("change", step);
  by("to-failing").addEventListener("click", () => view(viewed.at, viewed.among));
  by("to-none").addEventListener("click", () => { by("first").value = by("second").value = 0; step(); });
  by("step").addEventListener("click", () => walk(1));
  by("step-back").addEventListener("click", () => walk(-1));
  by("image-back").addEventListener("click", () => go(-1));
  by("image-on").addEventListener("click", () => go(1));
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
