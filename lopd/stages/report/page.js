"use strict";
// The viewer of answers: one answer is in the document at a time, so that many tokens are no load.
// Texts of models only ever become text nodes.
(function () {
  const answers = JSON.parse(document.getElementById("answers").textContent);
  const viewer = document.getElementById("viewer");
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
    const label = `${answer.run}: ${answer.id}/${answer.sample}, ${answer.tokens.length} tokens, ` +
      `${answer.finish}, ${mean.toFixed(3)} nat per token`;
    const option = make("option", "", label);
    option.value = number;
    select.append(option);
  });
  viewer.append(select, prompt, text, lists);
  let answer, chosen;

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

  function show(number) {
    answer = answers[number];
    chosen = undefined;
    prompt.textContent = answer.prompt;
    const nodes = answer.tokens.map((token, index) => {
      const node = make("span", "token", visible(token));
      node.tabIndex = -1;
      node.dataset.index = index;
      node.style.setProperty("--heat", Math.min(answer.divergence[index] / high, 1) * 0.75);
      return node;
    });
    text.replaceChildren(...nodes);
    if (nodes.length) choose(nodes[0], 0);
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
    choose(text.children[index], index);
    chosen.focus();
    event.preventDefault();
  });
  select.addEventListener("change", () => show(Number(select.value)));
  show(0);
})();
