// The study page: two viewports at most, their tools, keys, findings and the form of the verdict.
import { Viewer } from "./review_viewer.js";

const view = JSON.parse(document.getElementById("view").textContent), $ = id => document.getElementById(id);
const slider = $("slice"), link = $("link"), marks = [];
let offset = 0, following = false;

const viewers = [...document.querySelectorAll(".pane")].map((root, k) => new Viewer(root, view.panes[k], {
  failed: view.words.load_failed,
  scrolled: v => { if (v === main()) syncSlider(); follow(v); },
  windowed: v => { for (const other of viewers) if (other !== v && other.pane.unit === v.pane.unit && (other.center !== v.center || other.width !== v.width)) other.setWindow(v.center, v.width); press(); },
  marked: at => addMark(at),
}));
const main = () => viewers[0];

function syncSlider() {
  if (!slider) return;
  slider.value = main().z + 1;
  slider.setAttribute("aria-valuetext", `${main().z + 1} / ${main().depth}`);
  $("sliceno").textContent = `${main().z + 1} / ${main().depth}`;
}

function nearest(places, mm) {
  let best = 0;
  places.forEach((p, k) => { if (Math.abs(p - mm) < Math.abs(places[best] - mm)) best = k; });
  return best;
}

function follow(v) {
  const other = viewers.find(o => o !== v);
  if (!other || !link?.checked || following) return;
  following = true;
  const [from, to] = [v.pane.places, other.pane.places], sign = v === main() ? 1 : -1;
  other.go(from && to ? nearest(to, from[v.z] + sign * offset) : v.z / Math.max(1, v.depth - 1) * (other.depth - 1));
  following = false;
}

function press() {
  for (const button of document.querySelectorAll("[data-preset]")) {
    const [, center, width] = main().pane.presets[button.dataset.preset];
    button.setAttribute("aria-pressed", String(main().center === center && main().width === width));
  }
}

function preset(k) {
  const chosen = main()?.pane.presets[k];
  if (chosen) main().setWindow(chosen[1], chosen[2]);
}

const each = action => viewers.forEach(action);
function toggleOverlay() {
  if (!$("overlay")) return;
  each(v => { v.overlay = !v.overlay; v.draw(); });
  $("overlay").setAttribute("aria-pressed", String(main().overlay));
}
function setOpacity(percent) {
  if (!$("opacity")) return;
  $("opacity").value = percent;
  each(v => { v.opacity = $("opacity").value / 100; v.draw(); });
}
function invert() {
  each(v => { v.invert = !v.invert; v.draw(); });
  document.querySelector('[data-do="invert"]').setAttribute("aria-pressed", String(main().invert));
}

function goTo(n) {
  const finding = main().pane.findings.find(f => f.n === n);
  if (!finding) return;
  main().show(finding);
  for (const item of document.querySelectorAll(".finds li")) item.classList.toggle("on", Number(item.dataset.n) === n);
  if (!main().overlay) toggleOverlay();
  main().canvas.focus({ preventScroll: true });
}
function step(by) {
  const list = main().pane.findings.map(f => f.n), at = list.indexOf(main().selected);
  if (list.length) goTo(list[(at < 0 ? (by > 0 ? 0 : list.length - 1) : at + by + list.length) % list.length]);
}

function marking(on) {
  if (!$("mark")) return;
  main().marking = on;
  main().root.classList.toggle("marking", on);
  $("mark").setAttribute("aria-pressed", String(on));
  if (on) { document.querySelector('[name="verdict"][value="edit"]')?.click(); main().canvas.focus({ preventScroll: true }); }
}
function addMark(at) {
  marks.push(at);
  marking(false);
  listMarks();
}
function listMarks() {
  $("added").value = JSON.stringify(marks);
  main().marks = marks;
  main().draw();
  $("marks").replaceChildren(...marks.map((at, k) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = view.words.remove;
    button.addEventListener("click", () => { marks.splice(k, 1); listMarks(); });
    item.append(view.words.marked.replace("{k}", at.slice + 1).replace("{y}", at.y).replace("{x}", at.x), " ", button);
    return item;
  }));
}

const KEYS = {
  1: () => preset(0), 2: () => preset(1), 3: () => preset(2), 4: () => preset(3), 5: () => preset(4),
  "+": () => each(v => v.zoomBy(1.25)), "=": () => each(v => v.zoomBy(1.25)), "-": () => each(v => v.zoomBy(0.8)), 0: () => each(v => v.fit()),
  o: toggleOverlay, i: invert, n: () => step(1), p: () => step(-1), "?": () => $("keys").showModal(),
  "[": () => setOpacity(Number($("opacity")?.value) - 10), "]": () => setOpacity(Number($("opacity")?.value) + 10),
  w: () => grow(1.1), s: () => grow(1 / 1.1), a: () => raise(-1), d: () => raise(1),
  l: () => link?.click(), Escape: () => marking(false),
  Enter: () => { if (main().marking) { const at = main().middle(); if (at) addMark({ slice: main().z, ...at }); } },
};
const grow = f => main().setWindow(main().center, main().width * f), raise = by => main().setWindow(main().center + by * main().width / 20, main().width);
const ARROWS = { ArrowUp: v => -v.down, ArrowDown: v => v.down, ArrowLeft: () => -1, ArrowRight: () => 1, PageUp: v => -10 * v.down, PageDown: v => 10 * v.down,
  Home: v => -v.depth, End: v => v.depth };
const PAN = { ArrowUp: [0, 40], ArrowDown: [0, -40], ArrowLeft: [40, 0], ArrowRight: [-40, 0] };

addEventListener("keydown", event => {
  const target = event.target, typing = target.matches("input:not([type=checkbox]), textarea, select, summary"), inPanel = target.closest(".panel, dialog, header");
  if (!viewers.length || event.ctrlKey || event.metaKey || event.altKey || typing || $("keys").open) return;
  const active = viewers.find(v => v.canvas === target) || main();
  if (event.key in ARROWS) {
    if (inPanel) return;
    if (event.shiftKey && event.key in PAN) each(v => v.pan(...PAN[event.key]));
    else active.scroll(ARROWS[event.key](active));
    return event.preventDefault();
  }
  if (event.key === "Enter" && target !== active.canvas) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) { event.preventDefault(); action(); }
});

slider?.addEventListener("input", () => main().go(slider.value - 1));
link?.addEventListener("change", () => {
  const [a, b] = viewers;
  if (link.checked && a.pane.places && b.pane.places) offset = b.pane.places[b.z] - a.pane.places[a.z];
});
$("overlay")?.addEventListener("click", toggleOverlay);
$("opacity")?.addEventListener("input", () => setOpacity($("opacity").value));
$("help")?.addEventListener("click", () => $("keys").showModal());
$("mark")?.addEventListener("click", () => marking(!main().marking));
for (const button of document.querySelectorAll("[data-preset]")) button.addEventListener("click", () => preset(Number(button.dataset.preset)));
for (const button of document.querySelectorAll("[data-go]")) button.addEventListener("click", () => goTo(Number(button.dataset.go)));
for (const button of document.querySelectorAll("[data-drag]")) button.addEventListener("click", () => {
  each(v => { v.drag = button.dataset.drag; });
  for (const other of document.querySelectorAll("[data-drag]")) other.setAttribute("aria-pressed", String(other === button));
});
const DO = { zoomin: () => each(v => v.zoomBy(1.25)), zoomout: () => each(v => v.zoomBy(0.8)), fit: () => each(v => v.fit()), invert };
for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", () => DO[button.dataset.do]());

if (viewers.length) {
  syncSlider();
  press();
  const ticks = $("ticks"), n = main().depth;
  for (const f of n > 1 ? main().pane.findings : []) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [k, value] of Object.entries({ x: 1000 * f.z / (n - 1) - 3, y: 0, width: 6, height: 8 })) rect.setAttribute(k, value);
    ticks.append(rect);
  }
  if (view.first) { main().selected = view.first; document.querySelector(`.finds li[data-n="${view.first}"]`)?.classList.add("on"); }
  if (viewers.length > 1) follow(main());
}
