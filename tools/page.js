"use strict";
const all = (root, selector) => [...root.querySelectorAll(selector)];

// A number with `digits` decimals as Python writes it, with a sign.
const signed = (value, digits) => `${value < 0 ? "" : "+"}${value.toFixed(digits)}`.replace("-", "−");

// One table with its controls, and the strips that its filter acts on.
function setUp(results) {
  const form = results.querySelector("form.controls"), status = results.querySelector(".status");
  const table = results.querySelector(".sortable"), body = table.tBodies[0], rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const stored = results.querySelector("script[type='application/json']");
  const scores = stored ? JSON.parse(stored.textContent) : {};
  const pairs = {};
  for (const [score, { pairs: listed }] of Object.entries(scores)) {
    pairs[score] = new Map(listed.map(([index, other, value, half]) => [`${index} ${other}`, [value, half]]));
  }

  // [value, half the interval] of a row minus another.
  function difference(score, index, other) {
    const [value, half] = pairs[score].get(`${Math.max(index, other)} ${Math.min(index, other)}`) ?? [null, null];
    return value === null ? null : [index > other ? value : -value, half];
  }

  function fillDifferences(baseline) {
    const base = new Map();
    rows.forEach((row, index) => { if (row.dataset.method === baseline) base.set(row.dataset.nfe, index); });
    for (const cell of all(table, "[data-score]")) {
      const index = rows.indexOf(cell.parentElement), other = base.get(cell.parentElement.dataset.nfe);
      const { digits } = scores[cell.dataset.score];
      cell.hidden = baseline === "";
      cell.className = "";
      cell.textContent = cell.dataset.value = "";
      if (other === undefined || cell.previousElementSibling.dataset.value === "") continue; // no such score
      if (other === index) {
        cell.dataset.value = 0;
        cell.textContent = "baseline";
        cell.className = "quiet";
        continue;
      }
      const found = difference(cell.dataset.score, index, other);
      if (found === null) continue;
      const [value, half] = found;
      cell.dataset.value = value;
      cell.textContent = `${signed(value, digits)} ±\u00a0${half.toFixed(digits)}`;
      cell.className = value + half < 0 ? "better" : value - half > 0 ? "worse" : "";
    }
    heads.forEach((head, column) => {
      if (rows[0].cells[column].dataset.score) head.hidden = baseline === "";
    });
  }

  function compare(a, b) {
    if (a === "" || b === "") return null;
    const numbers = [Number(a), Number(b)];
    return numbers.some(Number.isNaN) ? a.localeCompare(b, undefined, { numeric: true }) : numbers[0] - numbers[1];
  }

  // Empty cells stay at the end in both orders; equal ones keep the first order of the page.
  function sort() {
    const column = heads.findIndex(head => head.ariaSort);
    if (column < 0) return body.append(...rows);
    const direction = heads[column].ariaSort === "ascending" ? 1 : -1;
    const value = row => row.cells[column].dataset.value;
    const order = (a, b) => compare(value(a), value(b)) ?? direction * ((value(a) === "") - (value(b) === ""));
    body.append(...[...rows].sort((a, b) => direction * order(a, b)));
  }

  function filter() {
    const typed = (form?.elements.method?.value ?? "").toLowerCase();
    const wanted = typed.split(",").map(part => part.trim()).filter(Boolean);
    const nfes = form ? all(form, "[name=nfe]:checked").map(box => box.value) : [];
    const hides = place => (place.dataset.nfe !== undefined && nfes.length > 0 && !nfes.includes(place.dataset.nfe)) ||
      (place.dataset.method !== undefined && wanted.length > 0 &&
        !wanted.some(part => place.dataset.method.toLowerCase().includes(part)));
    for (const place of all(results, "[data-nfe], [data-method]")) place.hidden = hides(place);
  }

  // Lets numbers wrap in a table that is too wide otherwise.
  function fit() {
    table.classList.remove("tight");
    table.classList.toggle("tight", table.scrollWidth > results.clientWidth);
  }

  function update() {
    const baseline = form?.elements.baseline?.value ?? "", sorted = heads.find(head => head.ariaSort);
    filter();
    if (stored) fillDifferences(baseline);
    if (sorted?.hidden) sorted.removeAttribute("aria-sort");
    sort();
    const words = [`${rows.filter(row => !row.hidden).length} of ${rows.length} rows`];
    if (sorted && !sorted.hidden) {
      words.push(`sorted by ${sorted.textContent.trim().replace(/\s+/g, " ")}, ${sorted.ariaSort}`);
    }
    if (baseline) words.push(`row minus ${baseline} at the same evaluations`);
    fit();
    status.textContent = words.join("; ");
  }

  for (const head of heads) {
    head.firstElementChild.addEventListener("click", () => {
      const next = head.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", next);
      update();
    });
  }
  if (form) {
    form.hidden = false;
    form.addEventListener("input", update);
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("reset", () => {
      for (const head of heads) head.removeAttribute("aria-sort");
      setTimeout(update);
    });
  }
  addEventListener("resize", fit);
  update();
}
all(document, ".results").forEach(setUp);

// Copies the command beside a button.
async function copy(button) {
  const code = button.parentElement.querySelector("code");
  let done = true;
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {  // only pages from a file or over https may use the clipboard
    getSelection().selectAllChildren(code);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Press Ctrl+C";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}
for (const button of all(document, ".copy")) {
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", () => copy(button));
}

// The images of one seed by all methods that the filter shows.
const dialog = document.querySelector("dialog"), heading = dialog.querySelector("h2");
let section = null, shown = 0;
const seedButtons = () => all(section, ".seeds button");

function enlarge(index) {
  const [width, height, gap] = section.dataset.size.split(" ").map(Number), buttons = seedButtons();
  shown = (index + buttons.length) % buttons.length;
  heading.textContent = `Seed ${buttons[shown].textContent}, ${section.querySelector("h3").textContent}`;
  const figures = all(section, "figure:not([hidden])").map(figure => {
    const copied = document.createElement("figure"), canvas = document.createElement("canvas");
    const caption = figure.querySelector("figcaption").cloneNode(true), image = figure.querySelector("img");
    Object.assign(canvas, { width, height, role: "img", ariaLabel: image.alt, className: image.className });
    canvas.getContext("2d").drawImage(image, shown * (width + gap), 0, width, height, 0, 0, width, height);
    copied.append(canvas, caption);
    return copied;
  });
  dialog.querySelector(".images").replaceChildren(...figures);
}

function open(place, index) {
  section = place;
  enlarge(index);
  dialog.showModal();
}

for (const place of all(document, ".strips")) {
  const [width, height, gap] = place.dataset.size.split(" ").map(Number);
  place.querySelector(".seeds").hidden = false;
  all(place, ".seeds button").forEach((button, index) => button.addEventListener("click", () => open(place, index)));
  for (const image of all(place, "img")) {
    image.addEventListener("click", event => {
      const pitch = image.clientHeight * (width + gap) / height;
      open(place, Math.min(Math.floor(event.offsetX / pitch), all(place, ".seeds button").length - 1));
    });
  }
}
dialog.addEventListener("click", event => {
  const step = event.target.dataset?.step;
  if (event.target === dialog || step === "0") dialog.close();
  else if (step) enlarge(shown + Number(step));
});
dialog.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  enlarge(shown + step);
});
dialog.addEventListener("close", () => seedButtons()[shown].focus());
