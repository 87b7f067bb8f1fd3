"use strict";
// Sort tables, compare images with a slider, open them at full size, and play the videos of one prompt in sync.
// The page is complete without this script.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, kind = "", text = "") => {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  return element;
};

// Tables: a button in each heading sorts the rows by that column, with empty cells last.
const key = cell => (cell.dataset.value === undefined ? cell.textContent.trim() : parseFloat(cell.dataset.value));
const compare = (a, b) => {
  if (typeof a === "string") return a.localeCompare(b, undefined, { numeric: true });
  return Number.isNaN(a) - Number.isNaN(b) || a - b;
};
for (const heading of all("table.sortable th")) {
  const button = make("button", "", heading.textContent);
  button.type = "button";
  heading.replaceChildren(button);
  button.addEventListener("click", () => {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a.cells[column]), key(b.cells[column])];
      return descending && !Number.isNaN(x) && !Number.isNaN(y) ? compare(y, x) : compare(x, y);
    });
    for (const other of all("th", heading.parentElement)) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows);
  });
}

// Sliders: the reference covers the candidate on the left of the edge.
const addSlider = (view, reference) => {
  const over = make("img", "over");
  over.src = reference;
  over.alt = "";
  const range = Object.assign(make("input"), { type: "range", min: 0, max: 100, value: 50 });
  range.setAttribute("aria-label", "share of the reference");
  const move = share => view.style.setProperty("--x", `${Math.min(100, Math.max(0, share))}%`);
  range.addEventListener("input", () => move(range.value));
  view.append(over, make("div", "edge"), range);
  let dragged = false;
  let from = null;
  const follow = event => {
    const box = view.getBoundingClientRect();
    move(100 * (event.clientX - box.left) / box.width);
  };
  view.addEventListener("pointerdown", event => { from = event.clientX; dragged = false; });
  view.addEventListener("pointermove", event => {
    if (event.pointerType !== "mouse" && from === null) return;
    dragged = dragged || (from !== null && Math.abs(event.clientX - from) > 4);
    follow(event);
  });
  for (const end of ["pointerup", "pointercancel", "pointerleave"]) view.addEventListener(end, () => { from = null; });
  view.addEventListener("click", event => { if (dragged) event.stopImmediatePropagation(); }, true);
};
for (const view of all(".cells .view")) addSlider(view, document.getElementById(view.dataset.reference).src);

// Zoom: each group is {title, images: {reference, candidate, error}}. Each image is an <img> of the page, whose
// data-full is the path of the full-size file if the page has a reduced one.
const dialog = document.getElementById("zoom");
const stage = dialog.querySelector(".stage");
const LABELS = { slide: "slider", side: "side by side", error: "FLIP error", one: "image" };
const opened = { group: 0, mode: "slide", actual: false };
const groups = [];

const modesOf = images => (images.reference && images.candidate ? ["slide", "side", ...(images.error ? ["error"] : [])] : ["one"]);

const fullSize = image => {
  const copy = make("img");
  copy.alt = image.alt;
  copy.src = image.dataset.full || image.src;
  copy.addEventListener("error", () => {
    if (copy.src === image.src) return;
    dialog.querySelector(".note").textContent = "reduced: the full-size file is missing";
    copy.src = image.src;
  });
  return copy;
};

const fit = () => {
  const boxes = [...stage.children];
  const style = getComputedStyle(stage);
  const pad = parseFloat(style.paddingLeft) * 2 + 10 * (boxes.length - 1);
  const wide = innerWidth > innerHeight || boxes.length < 2;
  stage.style.flexDirection = wide ? "row" : "column";
  for (const box of boxes) {
    const image = box.querySelector("img");
    if (!image || !image.naturalWidth) continue;
    const width = (stage.clientWidth - pad) / (wide ? boxes.length : 1);
    const height = (stage.clientHeight - 44) / (wide ? 1 : boxes.length);
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
    const ratio = opened.actual ? 1 / devicePixelRatio : scale > 2 ? Math.floor(scale) : scale;
    box.style.width = `${Math.max(1, image.naturalWidth * ratio)}px`;
    for (const one of all("img", box)) one.classList.toggle("pixels", ratio * devicePixelRatio >= 2);
  }
};

const figure = (image, caption) => {
  const box = make("figure");
  const copy = fullSize(image);
  copy.addEventListener("load", fit);
  box.append(copy, make("figcaption", "", caption));
  return box;
};

const slider = images => {
  const box = make("div", "view");
  const copy = fullSize(images.candidate);
  copy.addEventListener("load", fit);
  box.append(copy);
  addSlider(box, images.reference.dataset.full || images.reference.src);
  const over = box.querySelector(".over");
  over.addEventListener("error", () => { over.src = images.reference.src; }, { once: true });
  return box;
};

const draw = () => {
  const { title, images } = groups[opened.group];
  const modes = modesOf(images);
  if (!modes.includes(opened.mode)) opened.mode = modes[0];
  dialog.querySelector(".title").textContent = title;
  dialog.querySelector(".note").textContent = opened.mode === "slide" ? "the reference is on the left of the edge" : "";
  const tools = dialog.querySelector(".modes");
  tools.replaceChildren(...modes.map(mode => {
    const button = make("button", "", LABELS[mode]);
    button.type = "button";
    button.setAttribute("aria-pressed", String(mode === opened.mode));
    button.addEventListener("click", () => { opened.mode = mode; draw(); });
    return button;
  }));
  const shown = {
    slide: () => [slider(images)],
    side: () => [figure(images.reference, "reference"), figure(images.candidate, "candidate")],
    error: () => [figure(images.error, "FLIP error: black means no visible difference")],
    one: () => [figure(Object.values(images)[0], "")],
  };
  stage.replaceChildren(...shown[opened.mode]());
  dialog.querySelector(".size").setAttribute("aria-pressed", String(opened.actual));
  fit();
};

const open = (group, mode) => {
  Object.assign(opened, { group, mode, actual: false });
  if (!dialog.open) dialog.showModal();
  draw();
};

const opens = (element, group, mode) => element.addEventListener("click", () => open(group, mode));

for (const entry of all(".entry")) {
  const prompt = entry.querySelector("h3").firstChild.textContent.trim();
  for (const cell of all(".candidates figure", entry)) {
    const view = cell.querySelector(".view");
    const reference = document.getElementById(view.dataset.reference);
    const error = cell.querySelector(".image img");
    const title = `${prompt} · ${cell.querySelector("b").textContent}`;
    groups.push({ title, images: { reference, candidate: view.querySelector("img"), error } });
    opens(view, groups.length - 1, "slide");
    opens(error.closest("button"), groups.length - 1, "error");
    const first = reference.closest("button");
    if (!first.dataset.opens) {
      first.dataset.opens = "side";
      opens(first, groups.length - 1, "side");
    }
  }
  for (const button of all(".source .image", entry)) {
    groups.push({ title: `${prompt} · source image`, images: { one: button.querySelector("img") } });
    opens(button, groups.length - 1, "one");
  }
  const [reference, ...others] = all(".strip tbody tr", entry);
  for (const row of others) {
    all(".image", row).forEach((button, i) => {
      const expected = all(".image", reference)[i];
      const images = { reference: expected.querySelector("img"), candidate: button.querySelector("img") };
      groups.push({ title: `${prompt} · ${row.cells[0].textContent} · frame ${button.dataset.frame}`, images });
      opens(button, groups.length - 1, "slide");
      if (row === others[0]) opens(expected, groups.length - 1, "side");
    });
  }
}

const step = by => open((opened.group + by + groups.length) % groups.length, opened.mode);
dialog.querySelector(".close").addEventListener("click", () => dialog.close());
dialog.querySelector(".size").addEventListener("click", () => { opened.actual = !opened.actual; draw(); });
dialog.querySelector(".back").addEventListener("click", () => step(-1));
dialog.querySelector(".next").addEventListener("click", () => step(1));
dialog.addEventListener("keydown", event => {
  if (event.target.type === "range") return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
addEventListener("resize", () => { if (dialog.open) fit(); });

// Videos: play, pause and seek all players of one prompt together.
for (const players of all(".players")) {
  const videos = all("video", players);
  for (const one of videos) {
    const others = videos.filter(other => other !== one);
    const align = () => others.forEach(other => {
      if (Math.abs(other.currentTime - one.currentTime) > 0.04) other.currentTime = one.currentTime;
    });
    one.addEventListener("play", () => { align(); others.forEach(other => other.play()); });
    one.addEventListener("pause", () => { others.forEach(other => other.pause()); align(); });
    one.addEventListener("seeked", () => { if (one.paused) align(); });
  }
}
