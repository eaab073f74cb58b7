"use strict";
// Tells which cell of a confusion matrix is pointed at, and enlarges it. Texts are set as text, never as markup.
for (const box of document.querySelectorAll(".matrix")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const svg = box.querySelector("svg");
  const told = box.querySelector(".told");
  const [row, column, here] = box.querySelectorAll(".cross, .here");
  const count = data.names.length;
  const counts = new Map(data.cells.map(([i, j, n]) => [i * count + j, n]));
  const side = Number(svg.dataset.side);
  const size = side / count;
  const name = (k) => data.names[k] + (data.groups.length ? " (" + data.groups[k] + ")" : "");
  const number = (n) => n.toLocaleString("en-US");

  const point = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const i = Math.floor(place.y / size), j = Math.floor(place.x / size);
    if (i < 0 || j < 0 || i >= count || j >= count) return;
    row.setAttribute("y", i * size); column.setAttribute("x", j * size);
    here.setAttribute("x", j * size); here.setAttribute("y", i * size);
    for (const mark of [row, column, here]) mark.setAttribute("visibility", "visible");
    const n = counts.get(i * count + j) || 0, total = data.totals[i];
    const share = total ? " (" + (100 * n / total).toFixed(1) + " %)" : "";
    told.textContent = i === j
      ? name(i) + ": " + number(n) + " of " + number(total) + " right" + share
      : "true " + name(i) + ", predicted " + name(j) + ": " + number(n) + " of " + number(total) + share;
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);

  const button = box.querySelector("button");
  if (button) button.addEventListener("click", () => {
    const large = box.classList.toggle("enlarged");
    button.textContent = large ? "Fit to the page" : "Enlarge";
  });
}
