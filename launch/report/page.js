// Charts of report.html: values at the pointer, and zoom. Values are read from the paths that
// matplotlib drew; `data-chart` (launch/report/svg_charts.py) says what a place in the SVG means.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const { box, x, y, log, share, labels, axis, zoom } = JSON.parse(svg.dataset.chart);
  const [left, top, right, bottom] = box;
  const up = log ? Math.log10 : value => value, down = log ? value => 10 ** value : value => value;
  const home = { x, y: y.map(up) };
  let view = home;
  const make = (name, attributes) => {
    const item = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) item.setAttribute(key, value);
    return svg.appendChild(item);
  };
  const mix = (range, share) => range[0] + share * (range[1] - range[0]);
  const within = (range, value) => (value - range[0]) / (range[1] - range[0]);
  const toX = (value, at = view) => mix([left, right], within(at.x, value));
  const toY = (value, at = view) => mix([bottom, top], within(at.y, value));
  const fromX = place => mix(view.x, within([left, right], place));
  const fromY = (place, at = view) => mix(at.y, within([bottom, top], place));

  // All lines, with their points as values; an id ends with the name that the chart gave it.
  const named = name => [...svg.querySelectorAll(`[id*="-${name}_"]`)];
  const lines = [...named("curve"), ...named("pale")].map(group => {
    const path = group.querySelector("path:not(defs path)");
    const numbers = (path?.getAttribute("d").match(/-?[\d.]+(?:e-?\d+)?/g) ?? []).map(Number);
    const points = [];
    for (let i = 0; i + 1 < numbers.length; i += 2)
      points.push([mix(x, within([left, right], numbers[i])), fromY(numbers[i + 1], home)]);
    const number = Number(group.id.match(/\d+$/)[0]);
    return { path, points, label: group.id.includes("-curve_") ? labels[number] ?? "" : null };
  }).filter(line => line.points.length);
  const moved = ["lost", "saves", "restart"].flatMap(named).flatMap(group =>
    [...group.querySelectorAll("use, path:not(defs path)")].map(item => ({
      item, at: mix(x, within([left, right], item.hasAttribute("x")
        ? Number(item.getAttribute("x")) : Number(item.getAttribute("d").match(/[\d.]+/)[0]))),
    })));
  const ticks = kind => named(`${kind}tick`).map(group => group.querySelector("text"))
    .filter(Boolean).map(text => {
      const mark = text.closest(`[id*="-${kind}tick_"]`).querySelector(kind === "x" ? "use" : "path");
      const at = kind === "x" ? mark.getAttribute("x") : mark.getAttribute("d").match(/[\d.]+/g)[1];
      return { text, first: text.textContent, at: Number(at) };
    });
  const xTicks = ticks("x"), yTicks = ticks("y");

  // Numbers with as many digits as tell values of the shown range apart.
  function write(value, range, asShare = false) {
    if (asShare) return `${write(100 * value, 100 * range)}%`;
    const digits = Math.ceil(Math.log10(Math.abs(value) / Math.abs(range) || 1)) + 4;
    const short = Number(value.toPrecision(Math.min(9, Math.max(3, digits))));
    return Math.abs(short) >= 1e6 || (short && Math.abs(short) < 1e-3)
      ? short.toExponential().replace("e+", "e") : short.toLocaleString("en", { maximumFractionDigits: 9 });
  }
  const writeY = value => write(down(value), Math.abs(down(view.y[1]) - down(view.y[0])), share);
  const writeX = value => write(value, (view.x[1] - view.x[0]) / 10);

  function show(next) {
    view = next;
    for (const { path, points } of lines)
      path.setAttribute("d", points.map(([a, b], i) => `${i ? "L" : "M"}${toX(a)} ${toY(b)}`).join(""));
    for (const { item, at } of moved) {
      const inside = at >= view.x[0] && at <= view.x[1];
      item.style.display = inside ? "" : "none";
      if (item.hasAttribute("x")) item.setAttribute("x", toX(at));
      else item.setAttribute("d", `M${toX(at)} ${bottom}L${toX(at)} ${top}`);
    }
    for (const { text, first, at } of xTicks)
      text.textContent = view === home ? first : writeX(fromX(at));
    for (const { text, first, at } of yTicks)
      text.textContent = view === home ? first : writeY(fromY(at));
  }
  function zoomTo(a, b) {
    const range = [Math.max(home.x[0], Math.min(a, b)), Math.min(home.x[1], Math.max(a, b))];
    const seen = lines.flatMap(line => line.points).filter(([at]) => at >= range[0] && at <= range[1]);
    if (seen.length < 2) return;
    const values = seen.map(([, value]) => value);
    const low = Math.min(...values), high = Math.max(...values);
    const room = 0.08 * (high - low) || 0.08 * Math.abs(high) || 1;
    show({ x: range, y: [low - room, high + room] });
  }

  const note = svg.parentElement.appendChild(document.createElement("div"));
  note.className = "values";
  note.hidden = true;
  const rule = make("line", { y1: top, y2: bottom, class: "rule" });
  const chosen = make("rect", { y: top, height: bottom - top, width: 0, class: "chosen" });
  const dots = make("g", {});
  const place = event => {
    const scale = svg.getScreenCTM().inverse();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(scale).x;
    return Math.min(right, Math.max(left, at));
  };
  function hide() {
    note.hidden = true;
    rule.style.display = "none";
    dots.replaceChildren();
  }
  function tell(at) {
    const told = [];
    for (const { path, points, label } of lines) {
      if (label === null) continue;
      const inside = points.filter(([a]) => a >= view.x[0] && a <= view.x[1]);
      if (!inside.length) continue;
      const near = inside.reduce((best, point) =>
        Math.abs(toX(point[0]) - at) < Math.abs(toX(best[0]) - at) ? point : best);
      told.push({ near, label, colour: getComputedStyle(path).stroke });
    }
    if (!told.length) return hide();
    const best = told.reduce((one, two) =>
      Math.abs(toX(two.near[0]) - at) < Math.abs(toX(one.near[0]) - at) ? two : one).near[0];
    dots.replaceChildren(...told.map(({ near, colour }) =>
      make("circle", { cx: toX(near[0]), cy: toY(near[1]), r: 3, style: `fill: ${colour}` })));
    rule.style.display = "";
    for (const end of ["x1", "x2"]) rule.setAttribute(end, toX(best));
    const row = (text, colour) => {
      const line = document.createElement("div");
      if (colour) line.appendChild(document.createElement("i")).style.background = colour;
      line.append(text);
      return line;
    };
    note.replaceChildren(row(`${axis} ${writeX(best)}`), ...told.map(({ near, label, colour }) =>
      row(`${label} ${writeY(near[1])}${near[0] === best ? "" : ` at ${writeX(near[0])}`}`, colour)));
    note.hidden = false;
    const area = svg.getBoundingClientRect(), card = svg.parentElement.getBoundingClientRect();
    const middle = area.left - card.left + area.width * toX(best) / svg.viewBox.baseVal.width;
    note.style.top = `${area.top - card.top}px`;
    note.style.left = `${Math.max(4, middle > card.width / 2 ? middle - note.offsetWidth - 12
      : Math.min(middle + 12, card.width - note.offsetWidth - 4))}px`;
  }
  let from = null;
  hide();
  svg.addEventListener("pointermove", event => {
    const at = place(event);
    tell(at);
    if (from === null) return;
    chosen.setAttribute("x", Math.min(from, at));
    chosen.setAttribute("width", Math.abs(at - from));
  });
  svg.addEventListener("pointerdown", event => {
    tell(place(event));
    if (!zoom || event.button) return;
    from = place(event);
    svg.setPointerCapture?.(event.pointerId);
  });
  svg.addEventListener("pointerup", event => {
    const at = place(event), begun = from;
    from = null;
    chosen.setAttribute("width", 0);
    if (begun !== null && Math.abs(at - begun) > 6) zoomTo(fromX(begun), fromX(at));
  });
  svg.addEventListener("pointercancel", () => { from = null; chosen.setAttribute("width", 0); });
  svg.addEventListener("pointerleave", () => { if (from === null) hide(); });
  svg.addEventListener("dblclick", () => { if (zoom) show(home); });
}
