// One of several panels at a time, by a slider, by buttons or by the rows of a table; and what a picture says of itself.
// Without this script every panel stands below the other, and titles say the rest.
"use strict";

const make = (tag, classes, text) => Object.assign(document.createElement(tag), { className: classes, textContent: text });

// each maker puts its controls into the page, and returns what marks the one that is chosen
const makers = {
  slider(panels, names, choose) {
    const label = make("label", "slider", ""), input = document.createElement("input"), said = make("output", "", "");
    Object.assign(input, { type: "range", min: 0, max: names.length - 1, step: 1 });
    input.addEventListener("input", () => choose(Number(input.value)));
    label.append("noise", input, "data", said);
    panels.append(label);
    return i => { input.value = i; said.value = names[i]; input.setAttribute("aria-valuetext", names[i]); };
  },
  buttons(panels, names, choose) {
    const bar = make("div", "toggle", "");
    const buttons = names.map((name, i) => {
      const button = make("button", "", name);
      button.addEventListener("click", () => choose(i));
      return button;
    });
    bar.append(...buttons);
    panels.prepend(bar);
    return i => buttons.forEach((button, j) => button.setAttribute("aria-pressed", i === j));
  },
  table(panels, names, choose) {
    const rows = [...panels.parentElement.querySelectorAll("tbody tr")];
    const buttons = rows.map((row, i) => {
      const button = make("button", "", names[i]);
      button.type = "button";
      row.cells[0].replaceChildren(button);
      row.addEventListener("click", () => choose(i));
      return button;
    });
    return i => rows.forEach((row, j) => {
      row.classList.toggle("chosen", i === j);
      buttons[j].setAttribute("aria-pressed", i === j);
    });
  },
};

for (const panels of document.querySelectorAll(".panels")) {
  const all = [...panels.children].filter(child => child.matches(".panel"));
  const names = all.map(panel => panel.dataset.name);
  const choose = i => { all.forEach((panel, j) => { panel.hidden = i !== j; }); mark(i); };
  for (const panel of all) panel.querySelector(":scope > .name")?.setAttribute("hidden", "");
  const mark = makers[panels.dataset.by](panels, names, choose);
  choose(Number(panels.dataset.first));
}

for (const type of ["pointerover", "click"]) document.addEventListener(type, event => {
  const picture = event.target.closest?.(".card img[title]");
  const readout = picture?.closest(".panels")?.parentElement.querySelector(".readout");
  if (readout) readout.textContent = picture.title;
});
