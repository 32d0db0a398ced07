// Look inside: how a text is cut, what each layer would say, where each head looks, what sampling does to the next token.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";
import * as api from "./api.js";
import { announce, configure, set, state } from "./store.js";
import { guessed, percent, Rejected, shade } from "./text.js";

const MOST = 128; // tokens that the server inspects at once
const PANES = { tokens: "Tokens", next: "Next token", layers: "Layers", attention: "Attention" };

export function Inside() {
  const [text, setText] = useState("Once upon a time");
  const [seen, setSeen] = useState(null);
  const [problem, setProblem] = useState(null);
  const [note, setNote] = useState("");
  const [isBusy, setBusy] = useState(false);
  const [pane, setPane] = useState("tokens");
  const [place, setPlace] = useState(0);

  const look = async (body, said = "", written = []) => {
    setBusy(true);
    setProblem(null);
    try {
      const found = await api.post("inspect", { model: state.model, ...body });
      const first = found.ids.length - written.length;
      found.tokens = found.tokens.map((token, place) => ({ ...token, accepted: written[place - first]?.accepted, rejected: written[place - first]?.rejected }));
      found.weights = found.attention.map((layer) => api.fromBase64(layer));
      setSeen(found);
      setPlace(found.ids.length - 1);
      setNote(said);
      announce(`${found.ids.length} tokens, ${found.layers} layers, ${found.heads} heads.`);
    } catch (error) {
      setProblem(error.message);
    }
    setBusy(false);
  };
  useEffect(() => {
    const given = state.inspecting;
    if (!given) return;
    set({ inspecting: null });
    api.post("tokenize", { model: given.model, messages: given.messages }).then(
      ({ tokens }) => {
        const all = [...tokens, ...given.tokens.map((one) => one.id)];
        const cut = all.length > MOST ? `The last ${MOST} of the conversation's ${all.length} tokens.` : "The conversation, as the model reads it.";
        look({ model: given.model, tokens: all.slice(-MOST) }, cut, given.tokens);
      },
      (error) => setProblem(error.message),
    );
  }, []);

  const Pane = { tokens: TokenPane, next: NextPane, layers: LayerPane, attention: AttentionPane }[pane];
  return html`<div class="scroller" tabindex="-1"><div class="column wide">
    <h1>Look inside</h1>
    <form class="inside-form" onSubmit=${(event) => (event.preventDefault(), look({ prompt: text }))}>
      <textarea aria-label="Text to look into" rows="2" dir="auto" value=${text} onInput=${(event) => setText(event.target.value)}></textarea>
      <button type="submit" class="primary" disabled=${isBusy}>${isBusy ? "Reading …" : "Look"}</button>
    </form>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    ${!seen && !problem && html`<p class="quiet">A text of up to ${MOST} tokens, or an answer of a chat: press “Look inside” below it.</p>`}
    ${seen && html`
      ${note && html`<p class="quiet">${note}</p>`}
      <div class="tabs" role="tablist" aria-label="Ways to look">
        ${Object.entries(PANES).map(([name, title]) => html`<button type="button" role="tab" key=${name} id=${`tab-${name}`}
          aria-selected=${pane === name} aria-controls="pane" tabindex=${pane === name ? 0 : -1}
          onClick=${() => setPane(name)} onKeyDown=${(event) => tabKeys(event, setPane)}>${title}</button>`)}
      </div>
      <section id="pane" role="tabpanel" aria-labelledby=${`tab-${pane}`}>
        <${Pane} seen=${seen} place=${Math.min(place, seen.ids.length - 1)} setPlace=${setPlace} />
      </section>
    `}
  </div></div>`;
}

function tabKeys(event, setPane) {
  const names = Object.keys(PANES);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const name = names[(names.indexOf(event.target.id.slice(4)) + step + names.length) % names.length];
  setPane(name);
  document.getElementById(`tab-${name}`).focus();
}

/** The text's tokens in a row; one is chosen, by click or arrow keys. */
function Strip({ seen, place, setPlace, styleOf, label, withIds }) {
  const list = useRef();
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(seen.ids.length - 1, place + step));
    setPlace(next);
    list.current.children[next].focus();
  };
  return html`<div class=${`strip${withIds ? " with-ids" : ""}`} ref=${list} role="group" aria-label=${label} onKeyDown=${move}>
    ${seen.tokens.map((token, index) => html`<button type="button" key=${index} class=${`token${index === place ? " active" : ""}${guessed(token, " accepted", " replaced")}`}
      style=${styleOf(index)} tabindex=${index === place ? 0 : -1} aria-pressed=${index === place} onClick=${() => setPlace(index)}
    ><code>${token.text}</code>${withIds && html`<small>${token.id}</small>`}${withIds && token.rejected?.length > 0 && html`<small><${Rejected} token=${token} /></small>`}</button>`)}
  </div>`;
}

const Bars = ({ top, taken }) => html`<table class="bars"><tbody>
  ${top.map(([id, text, share]) => html`<tr key=${id} class=${id === taken ? "taken" : ""}>
    <th scope="row"><code>${text}</code></th>
    <td><span class="bar" style=${{ "--w": `${100 * share}%` }}></span></td>
    <td class="number">${percent(share)}</td>
  </tr>`)}
</tbody></table>`;

function TokenPane({ seen, place, setPlace }) {
  const token = seen.tokens[place];
  const known = seen.tokens.filter((one) => one.logprob !== null);
  const nats = known.reduce((sum, one) => sum - one.logprob, 0);
  const bytes = seen.tokens.reduce((sum, one) => sum + (one.bytes ? one.bytes.split(" ").length : 0), 0);
  return html`
    <p class="quiet">${seen.ids.length} tokens for ${bytes} bytes${known.length > 0 && ` · perplexity ${Math.exp(nats / known.length).toFixed(1)}`}. The stronger its colour, the less the model expected a token.${seen.tokens.some((one) => guessed(one, 1, 1)) && " Underlined: a draft had guessed it. Struck through: guesses that were thrown away."}</p>
    <${Strip} seen=${seen} place=${place} setPlace=${setPlace} withIds=${true} label="Tokens; arrow keys move" styleOf=${(index) => shade(seen.tokens[index].logprob)} />
    <div class="detail" aria-live="polite">
      <h2><code>${token.text}</code></h2>
      <dl>
        <div><dt>id</dt><dd>${token.id}</dd></div>
        <div><dt>bytes</dt><dd>${token.bytes || "control token"}</dd></div>
        ${token.logprob !== null && html`
          <div><dt>probability</dt><dd>${percent(Math.exp(token.logprob))}</dd></div>
          <div><dt>surprisal</dt><dd>${(-token.logprob).toFixed(2)} nats</dd></div>
          <div><dt>rank</dt><dd>${token.rank}</dd></div>
          <div><dt>entropy here</dt><dd>${token.entropy.toFixed(2)} nats</dd></div>
        `}
      </dl>
      ${token.top.length > 0 && html`<h3>What the model expected here</h3><${Bars} top=${token.top} taken=${token.id} />`}
      ${place === seen.ids.length - 1 && html`<h3>What it would write next</h3><${Bars} top=${seen.following} />`}
    </div>
  `;
}

// What sampling does

/**
 * The law that a token is drawn from, in the engine's order: temperature, top-k, top-p, min-p; ties are kept.
 * Gives each id's probability before and after the filters, and which filter took it out.
 */
export function warp(logits, { temperature, top_k, top_p, min_p }) {
  const largest = logits.reduce((most, one) => Math.max(most, one), -Infinity);
  const order = [...logits.keys()].sort((one, other) => logits[other] - logits[one]);
  const weights = Float64Array.from(logits, (one) =>
    temperature === 0 ? Number(one === largest) : Math.exp((one - largest) / temperature));
  const removed = new Array(logits.length).fill(null);
  if (temperature === 0) order.slice(1).forEach((id) => ((weights[id] = 0), (removed[id] = "temperature 0")));
  const total = weights.reduce((sum, one) => sum + one, 0);
  const before = weights.map((one) => one / total);
  const drop = (from, filter) => {
    const least = logits[order[from - 1]];
    order.forEach((id) => {
      if (logits[id] < least && removed[id] === null) [removed[id], weights[id]] = [filter, 0];
    });
  };
  if (temperature > 0 && top_k > 0 && top_k < logits.length) drop(top_k, "top-k");
  if (temperature > 0 && top_p < 1) {
    const mass = top_p * weights.reduce((sum, one) => sum + one, 0);
    let held = 0;
    const last = order.findIndex((id) => (held += weights[id]) >= mass);
    if (last >= 0) drop(last + 1, "top-p");
  }
  if (min_p > 0) {
    weights.forEach((one, id) => {
      if (one < min_p * weights[order[0]] && removed[id] === null) [removed[id], weights[id]] = ["min-p", 0];
    });
  }
  const left = weights.reduce((sum, one) => sum + one, 0);
  return { order, before, after: weights.map((one) => one / left), removed };
}

const SLIDERS = [
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_k", "Top-k (0: all)", 0, 50, 1],
  ["top_p", "Top-p", 0.05, 1, 0.05],
  ["min_p", "Min-p", 0, 0.5, 0.01],
];

export const Sliders = () => SLIDERS.map(([name, title, min, max, step]) => html`<label class="slider" key=${name}>
  <span>${title}</span><span class="number">${state.settings[name]}</span>
  <input type="range" min=${min} max=${max} step=${step} value=${state.settings[name]}
    onInput=${(event) => configure({ [name]: Number(event.target.value) })} />
</label>`);

function NextPane({ seen, place, setPlace }) {
  const [next, setNext] = useState(seen.next);
  useEffect(() => {
    if (place === next.position && next.of === seen) return;
    let isStale = false;
    api.post("inspect", { model: seen.model, tokens: seen.ids, position: place, attention: false })
      .then((found) => isStale || setNext({ ...found.next, of: seen }), (error) => announce(error.message));
    return () => (isStale = true);
  }, [seen, place]);
  const logits = api.fromBase64(next.logits, Float32Array);
  const { order, before, after, removed } = warp(logits, state.settings);
  const kept = order.filter((id) => removed[id] === null && logits[id] > -1e29);
  const mass = kept.reduce((sum, id) => sum + before[id], 0);
  return html`
    <${Strip} seen=${seen} place=${place} setPlace=${setPlace} label="After which token; arrow keys move" styleOf=${() => ({ "--p": 0 })} />
    <div class="sliders"><${Sliders} /></div>
    <p class="quiet" aria-live="polite">${kept.length.toLocaleString("en")} of ${logits.length.toLocaleString("en")} tokens stay; they held ${percent(mass)} of the probability.</p>
    <table class="bars next">
      <thead><tr><th scope="col">Token</th><th scope="col">Before and after the filters</th><th scope="col" class="number">Drawn</th></tr></thead>
      <tbody>${order.slice(0, 24).map((id) => html`<tr key=${id} class=${removed[id] ? "removed" : ""}>
        <th scope="row"><code>${next.names[id]}</code></th>
        <td><span class="bar before" style=${{ "--w": `${100 * before[id]}%` }}></span><span class="bar" style=${{ "--w": `${100 * after[id]}%` }}></span></td>
        <td class="number">${removed[id] ?? percent(after[id])}</td>
      </tr>`)}</tbody>
    </table>
  `;
}

// The logit lens

function LayerPane({ seen, place, setPlace }) {
  const name = (layer) => (layer === 0 ? "embedding" : layer === seen.layers ? "output" : `layer ${layer}`);
  const layers = [...seen.lens.keys()].reverse();
  return html`
    <p class="quiet">What each layer would write next, read with the model's own output layer (the logit lens). The stronger the colour, the more certain. The small number is the rank that the layer gives to the model's final choice.</p>
    <div class="table-scroller" tabindex="0" role="region" aria-label="Logit lens"><table class="lens">
      <thead><tr><th scope="col"><span class="hidden">Layer</span></th>${seen.tokens.map((token, index) => html`<th scope="col" key=${index}>
        <button type="button" class="token" aria-pressed=${index === place} onClick=${() => setPlace(index)}><code>${token.text}</code></button></th>`)}</tr></thead>
      <tbody>${layers.map((layer) => html`<tr key=${layer}><th scope="row">${name(layer)}</th>
        ${seen.lens[layer].map((cell, index) => html`<td key=${index} class=${index === place ? "active" : ""} style=${{ "--p": (cell.top[0][2] * 42).toFixed(1) }}>
          <code>${cell.top[0][1]}</code><small>${cell.rank}</small></td>`)}</tr>`)}</tbody>
    </table></div>
    <div class="detail"><h2>After <code>${seen.tokens[place].text}</code></h2>
      <div class="layers">${layers.map((layer) => html`<div key=${layer}><h3>${name(layer)}</h3><${Bars} top=${seen.lens[layer][place].top} taken=${seen.lens.at(-1)[place].top[0][0]} /></div>`)}</div>
    </div>
  `;
}

// Attention

function AttentionPane({ seen, place, setPlace }) {
  const [layer, setLayer] = useState(seen.layers - 1);
  const [head, setHead] = useState(0);
  const n = seen.ids.length;
  const weights = seen.weights[Math.min(layer, seen.layers - 1)].subarray(Math.min(head, seen.heads - 1) * n * n).subarray(0, n * n);
  const row = weights.subarray(place * n, (place + 1) * n);
  const best = [...row.keys()].sort((one, other) => row[other] - row[one]).slice(0, 3).filter((index) => row[index] > 0);
  const said = best.map((index) => `${seen.tokens[index].text} ${percent(row[index] / 255)}`).join(", ");
  return html`
    <p class="quiet">Where layer ${layer + 1}, head ${head + 1} looks from the chosen token: the stronger the colour, the more. Below: every query (row) over every key (column).</p>
    <${Strip} seen=${seen} place=${place} setPlace=${setPlace} label="From which token; arrow keys move" styleOf=${(index) => ({ "--p": ((row[index] / 255) * 60).toFixed(1) })} />
    <p aria-live="polite"><code>${seen.tokens[place].text}</code> looks at ${said || "nothing"}.</p>
    <div class="attention">
      <${Heatmap} weights=${weights} n=${n} place=${place} setPlace=${setPlace} label=${`Layer ${layer + 1}, head ${head + 1}: attention of ${n} tokens`} />
      <div class="heads" role="group" aria-label="Layers and heads">
        ${seen.weights.map((all, l) => html`<div class="row" key=${l}><span class="quiet">${l + 1}</span>
          ${Array.from({ length: seen.heads }, (_, h) => html`<button type="button" key=${h} class="thumbnail" aria-pressed=${l === layer && h === head}
            aria-label=${`Layer ${l + 1}, head ${h + 1}`} title=${`Layer ${l + 1}, head ${h + 1}`} onClick=${() => (setLayer(l), setHead(h))}>
            <${Picture} weights=${all.subarray(h * n * n, (h + 1) * n * n)} n=${n} /></button>`)}</div>`)}
      </div>
    </div>
  `;
}

/** A pixel for each weight, in the accent colour; the square root makes faint ones visible. */
function Picture({ weights, n, ...rest }) {
  const canvas = useRef();
  useLayoutEffect(() => {
    const [red, green, blue] = getComputedStyle(canvas.current).getPropertyValue("--heat").split(" ").map(Number);
    const image = new ImageData(n, n);
    weights.forEach((weight, index) => image.data.set([red, green, blue, 255 * Math.sqrt(weight / 255)], 4 * index));
    canvas.current.getContext("2d").putImageData(image, 0, 0);
  }, [weights, n, matchMedia("(prefers-color-scheme: dark)").matches]);
  return html`<canvas ref=${canvas} width=${n} height=${n} ...${rest}></canvas>`;
}

function Heatmap({ weights, n, place, setPlace, label }) {
  const choose = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    setPlace(Math.max(0, Math.min(n - 1, Math.floor((n * (event.clientY - box.top)) / box.height))));
  };
  return html`<div class="heatmap" onClick=${choose}>
    <${Picture} weights=${weights} n=${n} role="img" aria-label=${label} />
    <span class="query" style=${{ "--top": `${(100 * place) / n}%`, "--height": `${100 / n}%` }}></span>
  </div>`;
}
