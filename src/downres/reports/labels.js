// Names beside the points of a picture, placed when it has been drawn, where widths are known: no name ever lies on another, on
// a marker or outside the axes. A trace names its points in `customdata`; what finds no place is left to the table and the tips.

/* Boxes { left, top, right, bottom } in pixels, y downwards; sharing an edge is no overlap. */
function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

/* Whether the line [x1, y1, x2, y2] has a point inside the box (Liang and Barsky). */
function crosses([x1, y1, x2, y2], box) {
  let from = 0, to = 1;
  for (const [along, start, low, high] of [[x2 - x1, x1, box.left, box.right], [y2 - y1, y1, box.top, box.bottom]]) {
    if (along === 0) {
      if (start <= low || start >= high) return false;
      continue;
    }
    const near = (low - start) / along, far = (high - start) / along;
    from = Math.max(from, Math.min(near, far));
    to = Math.min(to, Math.max(near, far));
  }
  return from < to;
}

/* A box for each of `points` { x, y, radius, width, height }, or null where there is no room for one, in the order given, so that
   whoever comes first has the choice. Each is inside `area`, clear of all `markers` (boxes) and of the boxes before it. Of the free
   places the nearest is taken, rather one that no line of `lines` runs through. `leader`: a line to the point, where it is far; it
   runs through no name, and through another marker only where there is no other way. */
function placeLabels(points, markers, lines, area) {
  const taken = [...markers], leaders = [];
  const inside = (b) => b.left >= area.left && b.right <= area.right && b.top >= area.top && b.bottom <= area.bottom;
  return points.map((point) => {
    const own = { left: point.x - point.radius, right: point.x + point.radius, top: point.y - point.radius, bottom: point.y + point.radius };
    const others = markers.filter((m) => !(m.left >= own.left && m.right <= own.right && m.top >= own.top && m.bottom <= own.bottom));
    let best = null;
    for (let ring = 0; ring < 40 && !(best && best.price < ring * 9); ring++) {
      for (let turn = 0; turn < 24; turn++) {
        // The box touches the marker's, `ring` steps away, in a direction that starts at the lower right and goes both ways.
        const angle = Math.PI / 4 + (turn % 2 ? 1 : -1) * Math.ceil(turn / 2) * Math.PI / 12, away = ring * 9;
        const reach = point.radius + 1 + away, cos = Math.cos(angle), sin = Math.sin(angle);
        const scale = 1 / Math.max(Math.abs(cos), Math.abs(sin));
        const x = point.x + reach * cos * scale + (point.width / 2) * Math.max(-1, Math.min(1, 1.5 * cos));
        const y = point.y + reach * sin * scale + (point.height / 2) * Math.max(-1, Math.min(1, 1.5 * sin));
        const box = { left: x - point.width / 2, right: x + point.width / 2, top: y - point.height / 2, bottom: y + point.height / 2 };
        if (!inside(box) || taken.some((other) => overlap(box, other)) || leaders.some((line) => crosses(line, box))) continue;
        const end = [Math.max(box.left, Math.min(point.x, box.right)), Math.max(box.top, Math.min(point.y, box.bottom))];
        const leader = ring > 0 ? [point.x, point.y, ...end] : null;
        if (leader && taken.slice(markers.length).some((name) => crosses(leader, name))) continue;
        const through = lines.filter((line) => crosses(line, box)).length, over = leader ? others.filter((m) => crosses(leader, m)).length : 0;
        const price = away + turn * 0.2 + 8 * Math.min(through, 3) + (leader ? 6 : 0) + 40 * over;
        if (!best || price < best.price) best = { ...box, leader, price };
      }
    }
    if (best) taken.push(best);
    if (best && best.leader) leaders.push(best.leader);
    return best;
  });
}

/* The names of a drawn plotly picture, over it; called again after every change of what is shown. */
function drawLabels(plot) {
  const { xaxis, yaxis } = plot._fullLayout, ns = plot.querySelector(".main-svg").namespaceURI;
  const area = { left: xaxis._offset, right: xaxis._offset + xaxis._length, top: yaxis._offset, bottom: yaxis._offset + yaxis._length };
  const at = (x, y) => [xaxis._offset + xaxis.d2p(x), yaxis._offset + yaxis.d2p(y)];
  const points = [], markers = [], lines = [];
  for (const trace of plot._fullData) {
    if (trace.visible !== true) continue;
    let before = null;
    trace.x.forEach((value, i) => {
      const here = value === null || trace.y[i] === null ? null : at(value, trace.y[i]);
      if (here && before && trace.mode.includes("lines")) lines.push([...before, ...here]);
      before = here;
      if (!here || !trace.mode.includes("markers")) return;
      const [x, y] = here, size = trace.marker.size[i] ?? trace.marker.size, radius = size / 2 + 1;
      if (x < area.left - 1 || x > area.right + 1 || y < area.top - 1 || y > area.bottom + 1) return;
      if (size) markers.push({ left: x - radius, right: x + radius, top: y - radius, bottom: y + radius });
      const bars = trace.error_y && trace.error_y.visible !== false && trace.error_y.array ? trace.error_y : null;
      if (bars) lines.push([...at(value, trace.y[i] - bars.arrayminus[i]), ...at(value, trace.y[i] + bars.array[i])]);
      const text = trace.customdata && trace.customdata[i];
      if (text) points.push({ x, y, radius, text: text.length > 32 ? `${text.slice(0, 31)}…` : text, first: trace.name === "chosen" ? 0 : trace.name === "original" ? 1 : 2 });
    });
  }
  points.sort((a, b) => a.first - b.first || b.x - a.x);

  plot.querySelector(".labels")?.remove();
  const svg = document.createElementNS(ns, "svg"), tips = [...plot.querySelectorAll(".main-svg")].pop();
  tips.before(svg);  // what a pointer brings up lies over the names
  svg.setAttribute("class", "labels");
  const texts = points.map((point) => {
    const text = svg.appendChild(document.createElementNS(ns, "text"));
    text.textContent = point.text;
    if (point.first === 0) text.setAttribute("class", "chosen");
    const { width, height } = text.getBBox();
    Object.assign(point, { width: width + 6, height: height + 2 });
    return text;
  });
  placeLabels(points, markers, lines, area).forEach((box, i) => {
    if (!box) return texts[i].remove();
    texts[i].setAttribute("x", (box.left + box.right) / 2);
    texts[i].setAttribute("y", (box.top + box.bottom) / 2);
    if (!box.leader) return;
    const line = svg.insertBefore(document.createElementNS(ns, "line"), svg.firstChild);
    ["x1", "y1", "x2", "y2"].forEach((name, k) => line.setAttribute(name, box.leader[k]));
  });
}
