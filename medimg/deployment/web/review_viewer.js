// One viewport: values are fetched once, windowed by a table, drawn with the overlay and the marks of findings.
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const INFERNO = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const COLOURS = [[255, 214, 90], [111, 227, 255], [255, 150, 190], [160, 255, 160], [255, 175, 110], [190, 170, 255]];

function heatTable() {
  const table = new Uint8ClampedArray(256 * 3);
  for (let v = 0; v < 256; v++) {
    const at = v / 255 * (INFERNO.length - 1), i = Math.min(Math.floor(at), INFERNO.length - 2), f = at - i;
    for (let c = 0; c < 3; c++) table[3 * v + c] = INFERNO[i][c] * (1 - f) + INFERNO[i + 1][c] * f;
  }
  return table;
}
const HEAT = heatTable();

export class Viewer {
  constructor(root, pane, on = {}) {
    Object.assign(this, { root, pane, on, z: pane.start, zoom: 1, dx: 0, dy: 0, invert: false, overlay: true, opacity: 0.6, drag: "window", selected: 0, marks: [], marking: false });
    [this.center, this.width] = pane.window;
    [this.depth, this.rows, this.columns] = pane.shape;
    this.canvas = root.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    this.raster = Object.assign(document.createElement("canvas"), { width: this.columns, height: this.rows });
    this.layer = Object.assign(document.createElement("canvas"), { width: this.columns, height: this.rows });
    [this.sy, this.sx] = pane.spacing ? pane.spacing.slice(1) : [1, 1];
    this.slices = new Array(this.depth);
    this.down = pane.letters?.[0] === "S" ? -1 : 1;        // which way the feet are
    const letters = pane.edges || {};
    for (const side of ["left", "right", "top", "bottom"]) root.querySelector(`.edge.${side}`).textContent = letters[side] || "";
    new ResizeObserver(() => this.draw()).observe(root);
    this.listen();
    this.ready = this.load();
  }

  async load() {
    const wait = this.root.querySelector(".wait");
    try {
      if (this.pane.overlay) this.loadOverlay();
      const bytes = this.rows * this.columns * { int16: 2, uint8: 1, rgb8: 3 }[this.pane.kind];
      const step = clamp(Math.round(4e6 / bytes), 1, 64);
      await this.fetchSlices(clamp(this.z - 1, 0, this.depth - 1), clamp(this.z + 2, 1, this.depth));
      wait.hidden = true;
      this.draw();
      const starts = [];
      for (let a = 0; a < this.depth; a += step) starts.push(a);
      starts.sort((a, b) => Math.abs(a + step / 2 - this.z) - Math.abs(b + step / 2 - this.z));
      for (const a of starts) await this.fetchSlices(a, Math.min(a + step, this.depth));
      this.root.dataset.loaded = "all";
    } catch (error) {
      wait.hidden = false;
      wait.textContent = this.on.failed || "!";
    }
  }

  async fetchSlices(a, b) {
    const answer = await fetch(`${this.pane.pixels}?a=${a}&b=${b}`, { credentials: "same-origin" });
    if (!answer.ok) throw new Error(answer.status);
    const buffer = await answer.arrayBuffer(), size = this.rows * this.columns * (this.pane.kind === "rgb8" ? 3 : 1);
    const all = this.pane.kind === "int16" ? new Int16Array(buffer) : new Uint8Array(buffer);
    for (let z = a; z < b; z++) this.slices[z] ??= all.subarray((z - a) * size, (z - a + 1) * size);
    if (this.z >= a && this.z < b) this.draw();
  }

  async loadOverlay() {
    const answer = await fetch(this.pane.overlay.url, { credentials: "same-origin" });
    if (!answer.ok) return;
    this.over = new Uint8Array(await answer.arrayBuffer());
    this.overDrawn = null;
    this.draw();
  }

  // ---- drawing
  table() {
    const { slope, intercept, kind } = this.pane, first = kind === "int16" ? -32768 : 0, n = kind === "int16" ? 65536 : 256;
    const key = `${this.center} ${this.width} ${this.invert}`;
    if (this.tableKey === key) return this.lut;
    this.lut = new Uint8ClampedArray(n);
    for (let i = 0; i < n; i++) {
      const grey = ((first + i) * slope + intercept - this.center) / this.width + 0.5;
      this.lut[i] = 255 * clamp(this.invert ? 1 - grey : grey, 0, 1);
    }
    this.tableKey = key;
    return this.lut;
  }

  paint() {
    const slice = this.slices[this.z];
    if (!slice) return false;
    const key = `${this.z} ${this.center} ${this.width} ${this.invert}`;
    if (this.painted === key) return true;
    const image = new ImageData(this.columns, this.rows), out = new Uint32Array(image.data.buffer), n = out.length;
    if (this.pane.kind === "rgb8") {
      for (let i = 0; i < n; i++) out[i] = 0xff000000 | slice[3 * i + 2] << 16 | slice[3 * i + 1] << 8 | slice[3 * i];
    } else {
      const lut = this.table(), shift = this.pane.kind === "int16" ? 32768 : 0;
      for (let i = 0; i < n; i++) { const g = lut[slice[i] + shift]; out[i] = 0xff000000 | g << 16 | g << 8 | g; }
    }
    this.raster.getContext("2d").putImageData(image, 0, 0);
    this.painted = key;
    return true;
  }

  paintOverlay() {
    if (this.overDrawn === this.z) return;
    const size = this.rows * this.columns, over = this.over.subarray(this.z * size, (this.z + 1) * size), image = new ImageData(this.columns, this.rows), { data } = image;
    this.edges = new Map();
    if (this.pane.overlay.name === "heat_map") {
      for (let i = 0; i < size; i++) if (over[i] > 8) { data.set(HEAT.subarray(3 * over[i], 3 * over[i] + 3), 4 * i); data[4 * i + 3] = over[i]; }
    } else {
      for (let i = 0; i < size; i++) {
        const label = over[i];
        if (!label) continue;
        data.set(COLOURS[(label - 1) % COLOURS.length], 4 * i);
        data[4 * i + 3] = 40;
        const x = i % this.columns, y = (i - x) / this.columns, path = this.edges.get(label) || new Path2D();
        if (!x || over[i - 1] !== label) { path.moveTo(x, y); path.lineTo(x, y + 1); }
        if (x === this.columns - 1 || over[i + 1] !== label) { path.moveTo(x + 1, y); path.lineTo(x + 1, y + 1); }
        if (!y || over[i - this.columns] !== label) { path.moveTo(x, y); path.lineTo(x + 1, y); }
        if (y === this.rows - 1 || over[i + this.columns] !== label) { path.moveTo(x, y + 1); path.lineTo(x + 1, y + 1); }
        this.edges.set(label, path);
      }
    }
    this.layer.getContext("2d").putImageData(image, 0, 0);
    this.overDrawn = this.z;
  }

  place() {
    const w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    const fit = Math.min(w / (this.columns * this.sx), h / (this.rows * this.sy)), s = fit * this.zoom;
    return { w, h, fit, s, x0: w / 2 + this.dx - this.columns * this.sx * s / 2, y0: h / 2 + this.dy - this.rows * this.sy * s / 2 };
  }

  draw() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; this.drawNow(); });
  }

  drawNow() {
    const { w, h, s, x0, y0 } = this.place(), dpr = devicePixelRatio || 1, c = this.context;
    if (!w || !h) return;
    if (this.canvas.width !== Math.round(w * dpr) || this.canvas.height !== Math.round(h * dpr)) {
      this.canvas.width = Math.round(w * dpr);
      this.canvas.height = Math.round(h * dpr);
    }
    c.setTransform(dpr, 0, 0, dpr, 0, 0);
    c.fillStyle = "#000";
    c.fillRect(0, 0, w, h);
    c.imageSmoothingEnabled = s * this.sx < 12;
    c.imageSmoothingQuality = "high";
    const size = [x0, y0, this.columns * this.sx * s, this.rows * this.sy * s];
    if (this.paint()) c.drawImage(this.raster, ...size);
    if (this.overlay) {
      if (this.over) {
        this.paintOverlay();
        c.globalAlpha = this.opacity;
        c.drawImage(this.layer, ...size);
        c.setTransform(dpr * this.sx * s, 0, 0, dpr * this.sy * s, dpr * x0, dpr * y0);
        c.lineWidth = 1.4 / (this.sx * s);
        for (const [label, path] of this.edges) { c.strokeStyle = `rgb(${COLOURS[(label - 1) % COLOURS.length]})`; c.stroke(path); }
        c.setTransform(dpr, 0, 0, dpr, 0, 0);
        c.globalAlpha = 1;
      }
      for (const finding of this.pane.findings) this.drawFinding(c, finding, s, x0, y0);
    }
    for (const mark of this.marks) if (mark.slice === this.z) this.drawMark(c, mark, s, x0, y0);
    this.tell(s);
  }

  drawFinding(c, f, s, x0, y0) {
    if (f.y === undefined || Math.abs(f.z - this.z) > f.depth) return;
    const on = f.n === this.selected;
    c.lineWidth = on ? 2 : 1.25;
    c.strokeStyle = on ? "#fff" : "rgba(255,255,255,.75)";
    c.shadowColor = "#000";
    c.shadowBlur = 3;
    let x = x0 + (f.x + 0.5) * this.sx * s, y = y0 + (f.y + 0.5) * this.sy * s, r;
    if (f.box) {
      const [a, b, e, d] = f.box;
      if (!f.outline || !this.over || on) c.strokeRect(x0 + b * this.sx * s, y0 + a * this.sy * s, (d - b) * this.sx * s, (e - a) * this.sy * s);
      x = x0 + d * this.sx * s; y = y0 + a * this.sy * s; r = 0;
    } else {
      r = (f.radius_mm || 5) * s + 8;
      c.beginPath();
      c.arc(x, y, r, 0, 2 * Math.PI);
      c.stroke();
    }
    c.fillStyle = "#fff";
    c.font = "600 13px system-ui, sans-serif";
    c.fillText(String(f.n), x + r * 0.72 + 4, y - r * 0.72 - 3);
    c.shadowBlur = 0;
  }

  drawMark(c, mark, s, x0, y0) {
    const x = x0 + (mark.x + 0.5) * this.sx * s, y = y0 + (mark.y + 0.5) * this.sy * s;
    c.strokeStyle = "#7cf5c2";
    c.lineWidth = 2;
    c.beginPath();
    for (const [a, b] of [[-14, -5], [5, 14]]) { c.moveTo(x + a, y); c.lineTo(x + b, y); c.moveTo(x, y + a); c.lineTo(x, y + b); }
    c.stroke();
  }

  // ---- what it says
  tell(s) {
    const show = (name, text) => { const at = this.root.querySelector(`[data-show="${name}"]`); if (at.textContent !== text) at.textContent = text; };
    const n = v => String(Math.abs(v) >= 20 ? Math.round(v) : +v.toPrecision(3));
    show("slice", this.depth > 1 ? `${this.z + 1} / ${this.depth}${this.pane.places ? `  ${this.pane.places[this.z].toFixed(1)} mm` : ""}` : "");
    show("window", this.pane.kind === "rgb8" ? "" : `W ${n(this.width)}  L ${n(this.center)}${this.pane.unit === "HU" ? " HU" : ""}`);
    show("zoom", `${Math.round(100 * this.zoom)} %`);
    const rule = this.root.querySelector(".rule");
    rule.hidden = !this.pane.spacing;
    if (this.pane.spacing) {
      const mm = [200, 100, 50, 20, 10, 5, 2].find(m => m * s <= 130) || 1, length = Math.round(mm * s);
      const line = rule.querySelector("svg");
      line.setAttribute("width", length);
      rule.querySelector("span").textContent = mm % 10 ? `${mm} mm` : `${mm / 10} cm`;
    }
    Object.assign(this.root.dataset, { z: this.z, window: `${this.center} ${this.width}`, overlay: this.overlay, opacity: this.opacity, zoom: this.zoom.toFixed(3), selected: this.selected });
    this.on.drawn?.(this);
  }

  voxel(px, py) {
    const { s, x0, y0 } = this.place(), x = (px - x0) / (this.sx * s) - 0.5, y = (py - y0) / (this.sy * s) - 0.5;
    return x < -0.5 || y < -0.5 || x > this.columns - 0.5 || y > this.rows - 0.5 ? null : { x: clamp(Math.round(x), 0, this.columns - 1), y: clamp(Math.round(y), 0, this.rows - 1) };
  }

  readout(px, py) {
    const at = this.voxel(px, py), slice = this.slices[this.z], to = this.root.querySelector('[data-show="value"]');
    if (!at || !slice || this.pane.kind === "rgb8") { to.textContent = ""; return; }
    const value = slice[at.y * this.columns + at.x] * this.pane.slope + this.pane.intercept;
    to.textContent = `${+value.toFixed(2)}${this.pane.unit === "HU" ? " HU" : ""}`;
  }

  // ---- what it does
  scroll(steps) { this.go(this.z + steps); }
  go(z) {
    z = clamp(Math.round(z), 0, this.depth - 1);
    if (z === this.z) return;
    this.z = z;
    this.draw();
    this.on.scrolled?.(this);
  }
  setWindow(center, width) { this.center = center; this.width = Math.max(width, this.pane.slope, 1e-6); this.draw(); this.on.windowed?.(this); }
  zoomBy(factor, px, py) {
    const before = this.place();
    px ??= before.w / 2; py ??= before.h / 2;
    const zoom = clamp(this.zoom * factor, 0.5, 24), f = zoom / this.zoom;
    this.dx = px - before.w / 2 - (px - before.w / 2 - this.dx) * f;
    this.dy = py - before.h / 2 - (py - before.h / 2 - this.dy) * f;
    this.zoom = zoom;
    this.draw();
  }
  pan(dx, dy) { this.dx += dx; this.dy += dy; this.draw(); }
  fit() { this.zoom = 1; this.dx = this.dy = 0; this.draw(); }
  show(finding) {
    this.selected = finding.n;
    if (finding.y !== undefined && this.zoom > 1) {
      const { s } = this.place();
      this.dx = -((finding.x + 0.5) - this.columns / 2) * this.sx * s;
      this.dy = -((finding.y + 0.5) - this.rows / 2) * this.sy * s;
    }
    if (finding.z === this.z) this.draw(); else this.go(finding.z);
  }
  middle() { const { w, h } = this.place(); return this.voxel(w / 2, h / 2); }

  listen() {
    const c = this.canvas, fingers = new Map();
    let wheel = 0, moved = 0, gap = 0;
    c.addEventListener("wheel", event => {
      event.preventDefault();
      const d = event.deltaY * (event.deltaMode ? 40 : 1);
      if (event.ctrlKey) return this.zoomBy(Math.exp(-d / 300), event.offsetX, event.offsetY);
      wheel += d;
      const steps = Math.trunc(wheel / 40);
      wheel -= steps * 40;
      if (steps) this.scroll(clamp(steps, -4, 4) * this.down);
    }, { passive: false });
    c.addEventListener("pointerdown", event => {
      c.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
      moved = gap = 0;
      if (event.button === 1) event.preventDefault();
    });
    c.addEventListener("pointermove", event => {
      this.readout(event.offsetX, event.offsetY);
      const last = fingers.get(event.pointerId);
      if (!last) return;
      const dx = event.offsetX - last[0], dy = event.offsetY - last[1];
      fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
      moved += Math.abs(dx) + Math.abs(dy);
      if (fingers.size === 2) {
        const [[ax, ay], [bx, by]] = [...fingers.values()], now = Math.hypot(ax - bx, ay - by);
        if (gap) this.zoomBy(now / gap, (ax + bx) / 2, (ay + by) / 2);
        gap = now;
        this.pan(dx / 2, dy / 2);
      } else if (event.pointerType === "touch") {
        wheel += dy;
        const steps = Math.trunc(wheel / 8);
        wheel -= steps * 8;
        if (this.depth > 1 && this.zoom <= 1) this.scroll(steps * this.down); else this.pan(dx, dy);
      } else if (event.shiftKey || event.buttons & 4 || this.drag === "pan") this.pan(dx, dy);
      else if (event.buttons & 1 && this.pane.kind !== "rgb8" && !this.marking) {
        const step = Math.max(this.width, 20 * Math.max(this.pane.slope, 1e-6)) / 300;
        this.setWindow(this.center + dy * step, this.width + dx * step);
      }
    });
    const end = event => {
      fingers.delete(event.pointerId);
      if (event.type === "pointerup" && this.marking && moved < 4) {
        const at = this.voxel(event.offsetX, event.offsetY);
        if (at) this.on.marked?.({ slice: this.z, ...at });
      }
    };
    for (const name of ["pointerup", "pointercancel"]) c.addEventListener(name, end);
    c.addEventListener("pointerleave", () => { this.root.querySelector('[data-show="value"]').textContent = ""; });
    c.addEventListener("dblclick", () => this.fit());
  }
}
