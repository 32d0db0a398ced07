// A run that is trained now, or was: its stages, its curves and what it wrote last, read again every few seconds.

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import * as api from "./api.js";
import { connectionLost } from "./connection.js";

const SECONDS = 3;

export function Training() {
  const [run, setRun] = useState(null);
  const [chosen, setChosen] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    let timer = 0;
    const read = async () => {
      let isDone = false;
      try {
        if (!document.hidden) {
          const found = await api.get("training");
          isDone = found.stages.every((one) => one.state === "done");
          setRun(found);
          setProblem(null);
        }
      } catch (error) {
        setProblem(error.message);
        if (error.status === 0 || error.status === 401) connectionLost(error);
      }
      if (!isDone) timer = setTimeout(read, 1000 * SECONDS);
    };
    read();
    return () => clearTimeout(timer);
  }, []);
  const trained = run?.stages.filter((one) => one.loss?.length) ?? [];
  const stage = trained.find((one) => one.name === chosen) ?? trained.findLast((one) => one.state === "unfinished") ?? trained.at(-1);
  return html`<div class="scroller" tabindex="-1"><div class="column wide">
    <h1>Training${run?.run && html`: <bdi>${run.run}</bdi>`}</h1>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    ${run && !run.run && html`<p class="quiet">This server was not started on a run. Start it on one to see its curves: <code>groundup serve runs/demo</code></p>`}
    ${run?.about && html`<p class="quiet">${run.about}</p>`}
    ${run?.run && html`<ol class="stages" aria-label="Stages">
      ${run.stages.map((one) => html`<li key=${one.name} class=${one.state.replace(" ", "-")}>
        ${one.loss?.length
          ? html`<button type="button" aria-pressed=${one === stage} onClick=${() => setChosen(one.name)}>${one.name}</button>`
          : html`<span>${one.name}</span>`}
        <small>${one.state === "unfinished" && one.loss?.length ? `step ${one.loss.at(-1)[0].toLocaleString("en")}` : one.state}</small>
      </li>`)}
    </ol>`}
    ${run?.run && !stage && html`<p class="quiet">Nothing is trained yet.</p>`}
    ${stage && html`<${Stage} stage=${stage} />`}
  </div></div>`;
}

function Stage({ stage }) {
  const figures = [
    ["step", stage.loss.at(-1)[0].toLocaleString("en")],
    ["loss", stage.loss.at(-1)[1].toFixed(3)],
    ...(stage.val_loss.length ? [["validation loss", stage.val_loss.at(-1)[1].toFixed(3)]] : []),
    ...(stage.tokens_per_second ? [["tokens/s", Math.round(stage.tokens_per_second).toLocaleString("en")]] : []),
  ];
  return html`<section aria-label=${stage.name}>
    <dl class="figures">${figures.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    <${Curves} loss=${stage.loss} validation=${stage.val_loss} />
    ${stage.samples.length > 0 && html`<h2>What it wrote at step ${stage.samples[0].step.toLocaleString("en")}</h2>
      ${stage.samples.map((one, index) => html`<blockquote key=${index} class="sample" dir="auto"><b>${one.prompt}</b>${one.text}</blockquote>`)}`}
  </section>`;
}

/** Round numbers from one value to another, about five. */
function ticks(low, high) {
  const rough = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(6)));
}

function Curves({ loss, validation }) {
  const [width, height, left, bottom] = [720, 300, 44, 28];
  const all = [...loss, ...validation];
  const steps = Math.max(...all.map(([step]) => step), 1);
  const values = all.map(([, value]) => value).filter(Number.isFinite);
  const [low, high] = [Math.floor(Math.min(...values) * 2) / 2, Math.ceil(Math.max(...values) * 2) / 2 || 1];
  const x = (step) => left + ((width - left - 8) * step) / steps;
  const y = (value) => 18 + ((height - bottom - 18) * (high - value)) / (high - low || 1);
  const line = (points) => points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  const end = (points) => points.at(-1)?.[1].toFixed(3);
  return html`<figure class="curves">
    <svg viewBox=${`0 0 ${width} ${height}`} role="img" aria-label=${`Loss over ${steps} steps: now ${end(loss)}${validation.length ? `, on held-out text ${end(validation)}` : ""}`}>
      ${ticks(low, high).map((value) => html`<g key=${value}>
        <line x1=${left} x2=${width - 8} y1=${y(value)} y2=${y(value)} class="grid" /><text x=${left - 8} y=${y(value) + 4} text-anchor="end">${value}</text>
      </g>`)}
      ${ticks(0, steps).map((step) => html`<text key=${step} x=${x(step)} y=${height - 6} text-anchor="middle">${step.toLocaleString("en")}</text>`)}
      <polyline points=${line(loss)} class="train" /><polyline points=${line(validation)} class="validation" />
      ${validation.map(([step, value]) => html`<circle key=${step} cx=${x(step)} cy=${y(value)} r="3" class="validation-point" />`)}
    </svg>
    <figcaption><span class="key train-key"></span> training <span class="key validation-key"></span> validation</figcaption>
  </figure>`;
}
