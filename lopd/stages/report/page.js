"use strict";
// The viewer of answers: one page of one answer is in the document, so that many tokens are no load.
// Texts of models only ever become text nodes.
(function () {
  const answers = JSON.parse(document.getElementById("answers").textContent);
  const viewer = document.getElementById("viewer");
  const PAGE = 4000; // tokens
  if (!viewer || !answers.length) return;

  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  const all = answers.flatMap((answer) => answer.divergence).sort((a, b) => a - b);
  const high = Math.max(all[Math.floor(0.98 * (all.length - 1))], 1e-6); // the darkest colour
  const select = make("select");
  const prompt = make("div", "prompt");
  const text = make("div", "text");
  const lists = make("div", "lists");
  select.setAttribute("aria-label", "answer");
  lists.setAttribute("aria-live", "polite");
  answers.forEach((answer, number) => {
    const mean = answer.divergence.reduce((a, b) => a + b, 0) / answer.divergence.length;
    const end = answer.finish === "length" ? "cut off" : "ended";
    const label = `${answer.run}: ${answer.title} (${answer.tokens.length} tokens, ${end}, ` +
      `${mean.toFixed(3)} nat per token)`;
    const option = make("option", "", label);
    option.value = number;
    select.append(option);
  });
  const [pages, back, where, forth] = [make("div"), make("button", "", "before"), make("span"),
    make("button", "", "after")];
  pages.append(back, where, forth);
  back.addEventListener("click", () => turnTo(first - PAGE));
  forth.addEventListener("click", () => turnTo(first + PAGE));
  viewer.append(select, prompt, pages, text, lists);
  let answer, chosen, first;

  function visible(token) { // a space or a newline alone would have no width
    return token === "" ? "\u2205" : token.replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5");
  }

  function listOf(title, entries, others) {
    const column = make("div");
    column.append(make("h4", "", title));
    const shared = new Set(others.map((entry) => entry[0]));
    for (const [token, logprob] of entries) {
      const row = make("div", shared.has(token) ? "row same" : "row");
      const bar = make("i");
      bar.style.width = `${100 * Math.exp(logprob)}%`;
      row.append(bar, make("span", "", JSON.stringify(token)),
        make("b", "", `${(100 * Math.exp(logprob)).toFixed(2)}%`));
      column.append(row);
    }
    return column;
  }

  function choose(node, index) {
    if (chosen) { chosen.classList.remove("chosen"); chosen.tabIndex = -1; }
    chosen = node;
    chosen.classList.add("chosen");
    chosen.tabIndex = 0;
    const [teacher, model] = answer.sampled[index];
    lists.replaceChildren(
      make("p", "", `token ${index}, ${JSON.stringify(answer.tokens[index])}: divergence ` +
        `${answer.divergence[index].toFixed(3)} nat; log-prob ${teacher.toFixed(2)} under the ` +
        `teacher, ${model.toFixed(2)} under the model`),
      listOf("teacher", answer.teacher[index], answer.model[index]),
      listOf("model", answer.model[index], answer.teacher[index]));
  }

  function show(number, index = 0) {
    answer = answers[number];
    prompt.textContent = answer.prompt;
    turnTo(index);
  }

  function turnTo(index) { // show the page that holds a token, and choose it
    const count = answer.tokens.length;
    first = index - index % PAGE;
    chosen = undefined;
    const nodes = answer.tokens.slice(first, first + PAGE).map((token, place) => {
      const node = make("span", "token", visible(token));
      node.tabIndex = -1;
      node.dataset.index = first + place;
      node.style.setProperty("--heat", Math.min(answer.divergence[first + place] / high, 1) * 0.75);
      return node;
    });
    text.replaceChildren(...nodes);
    pages.hidden = count <= PAGE;
    where.textContent = ` tokens ${first} to ${first + nodes.length - 1} of ${count} `;
    back.disabled = first === 0;
    forth.disabled = first + PAGE >= count;
    if (nodes.length) choose(text.children[index - first], index);
  }

  function tokenOf(event) {
    const node = event.target.closest && event.target.closest(".token");
    if (node) choose(node, Number(node.dataset.index));
  }

  text.addEventListener("pointerover", tokenOf);
  text.addEventListener("click", tokenOf);
  text.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
    if (!(event.key in steps) || !chosen) return;
    const last = answer.tokens.length - 1;
    const index = Math.min(Math.max(Number(chosen.dataset.index) + steps[event.key], 0), last);
    if (index >= first && index < first + PAGE) choose(text.children[index - first], index);
    else turnTo(index);
    chosen.focus();
    event.preventDefault();
  });
  select.addEventListener("change", () => show(Number(select.value)));
  for (const button of document.querySelectorAll("button.jump")) {
    button.addEventListener("click", () => {
      select.value = button.dataset.answer;
      show(Number(button.dataset.answer), Number(button.dataset.token));
      viewer.scrollIntoView();
      chosen.scrollIntoView({ block: "nearest" });
      chosen.focus({ preventScroll: true });
    });
  }
  show(0);
})();
