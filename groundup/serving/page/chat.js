// The conversation: asking, answers as they are written, votes, corrections, branches, two answers side by side.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";
import * as api from "./api.js";
import {
  add, announce, begin, choose, messagesBefore, path, remember, running, sampling, save, set, siblings, state,
} from "./store.js";
import { connectionLost } from "./connection.js";
import { guessed, Icon, IconButton, Markdown, percent, readable, Rejected, shade } from "./text.js";

// Asking

async function write(node, stream) {
  const conversation = state.current;
  const stop = new AbortController();
  running.set(node.id, stop);
  Object.assign(node, { tokens: node.tokens ?? [], error: undefined, finish: undefined, n_tokens: 0 });
  let begun = 0;
  let frame = 0;
  const show = () => (frame ||= requestAnimationFrame(() => ((frame = 0), set({}))));
  set({});
  try {
    for await (const piece of stream(stop.signal)) {
      begun ||= performance.now();
      node.tokens.push(...piece.tokens);
      // A branch may begin within a character, of which the stream has only the rest.
      node.content = node.branched === undefined ? node.content + piece.text : api.textOf(node.tokens);
      node.finish = piece.finish ?? node.finish;
      if (piece.usage) node.n_tokens += piece.usage.completion_tokens;
      show();
    }
    if (!node.finish) throw new api.ServerError("The connection broke while the answer was written.");
    node.speed = node.n_tokens > 8 ? (1000 * (node.n_tokens - 1)) / (performance.now() - begun) : undefined;
    announce(`Answer: ${node.content.slice(0, 1000)}`);
  } catch (error) {
    if (error.name === "AbortError") {
      node.finish = "stopped";
      announce("Stopped.");
    } else {
      node.error = error.message;
      if (!(error instanceof api.ServerError)) console.warn(error);
      announce(`Error: ${error.message}`);
      if (error.status === 0 || error.status === 401) connectionLost(error);
    }
  } finally {
    running.delete(node.id);
    if (conversation.nodes[node.id]) await save(conversation);
    set({});
  }
}

function answer(parent, model, more = {}) {
  const node = add("assistant", "", parent, { model, ...more });
  const messages = messagesBefore(node);
  write(node, async function* (signal) {
    node.left_out = await tooMany(model, messages);
    yield* calculated(node, { model, messages: newer(messages, node.left_out) }, signal);
  });
  return node;
}

const isCall = (node) => node.content.trimStart().startsWith("<tool>");
const alike = (node, other) => JSON.stringify(node.turns) === JSON.stringify(other.turns);

/** An answer; if it is a call of the calculator that is run, and what the model says to the result is the answer. */
async function* calculated(node, body, signal) {
  yield* api.chat({ ...body, ...sampling() }, signal);
  if (node.turns || !isCall(node)) return;
  const { expression, result } = await api.post("calculator", { answer: node.content });
  if (expression === null) return;
  const turns = [{ role: "assistant", content: node.content }, { role: "tool", content: result }];
  Object.assign(node, { turns, sum: `${expression} = ${result}`, content: "", tokens: [], branched: node.branched === undefined ? undefined : -1, finish: undefined });
  yield* api.chat({ model: body.model, messages: [...body.messages, ...turns], ...sampling() }, signal);
}

/** A conversation without its oldest turns; what the assistant is told first stays. */
function newer(messages, left = 0) {
  const first = Number(messages[0].role === "system");
  return [...messages.slice(0, first), ...messages.slice(first + left)];
}

/** How many of the oldest turns do not fit into the model's context, with room to answer. */
async function tooMany(model, messages) {
  const turns = messages.filter((one) => one.role !== "system");
  for (let left = 0; ; left++) {
    if (left > 0 && turns[left].role !== "user") continue;
    const { count, max_model_len } = await api.post("tokenize", { model, messages: newer(messages, left) });
    const room = Math.min(state.settings.max_tokens ?? Infinity, max_model_len / 2);
    if (count <= max_model_len - room || left === turns.length - 1) return left;
  }
}

function ask(text, parent = state.current.leaf) {
  const question = add("user", text, parent);
  if (!state.second) return answer(question.id, state.model);
  const pair = question.id;
  const first = answer(question.id, state.model, { pair });
  answer(question.id, state.second, { pair });
  state.current.leaf = first.id;
}

const again = (node) => answer(node.parent, state.models.includes(node.model) ? node.model : state.model);

/** The same answer up to a token, another token instead, and whatever follows it. */
async function branch(node, place, other) {
  const messages = newer(messagesBefore(node), node.left_out);
  const kept = [...node.tokens.slice(0, place), { ...other, accepted: false, rejected: [], top: node.tokens[place].top }];
  const twin = add("assistant", api.textOf(kept), node.parent, {
    model: node.model, left_out: node.left_out, turns: node.turns, sum: node.sum, tokens: kept, branched: place,
  });
  write(twin, async function* (signal) {
    if (!other.bytes.length) return yield { text: "", tokens: [], finish: "stop" }; // the end of the answer was chosen
    const answer_ids = kept.map((one) => one.id);
    yield* calculated(twin, { model: node.model, messages, answer_ids }, signal);
  });
}

/** Whether the server has kept it. */
async function feedback(node, body, done) {
  const conversation = state.current;
  try {
    await api.post("feedback", { model: node.model, messages: messagesBefore(node), ...body });
    Object.assign(node, done, { notice: undefined });
    announce("Kept. Thank you.");
    await save(conversation);
    return true;
  } catch (error) {
    node.notice = error.message;
    announce(error.message);
    return false;
  }
}

async function vote(node, way) {
  const other = siblings(node).find((one) => one.vote && one.vote !== way && one.content !== node.content && alike(one, node));
  if (node.vote === way || !(await feedback(node, { vote: way, answer: node.content }, { vote: way })) || !other) return;
  const ranking = way === "up" ? [node.content, other.content] : [other.content, node.content];
  await feedback(node, { ranking }, {});
}

async function prefer(node, other) {
  if (!(await feedback(node, { ranking: [node.content, other.content] }, { preferred: true }))) return;
  other.preferred = false;
  if (state.current.nodes[node.id]) choose(node);
}

function lookInside(node) {
  set({ view: "inside", inspecting: { model: node.model, messages: newer(messagesBefore(node), node.left_out), tokens: node.tokens } });
  location.hash = "inside";
}

// An answer's tokens, shaded: the more surprising, the stronger the colour

function Tokens({ node, isBusy }) {
  const [active, setActive] = useState(null);
  const [focused, setFocused] = useState(0);
  const list = useRef();
  const card = useRef();
  useLayoutEffect(() => {
    if (active === null) return;
    const [token, place] = [list.current.children[active], list.current.getBoundingClientRect()];
    const line = token.getClientRects()[0];
    card.current.style.top = `${line.bottom - place.top}px`;
    card.current.style.left = `${Math.max(0, Math.min(line.left - place.left, place.width - card.current.offsetWidth))}px`;
    if (document.activeElement === token) card.current.scrollIntoView({ block: "nearest" });
  }, [active]);
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") setActive(null);
    if (!step) return;
    event.preventDefault();
    list.current.children[Math.max(0, Math.min(node.tokens.length - 1, focused + step))].focus();
  };
  const token = active === null ? null : node.tokens[active];
  return html`<div class="tokens" onMouseLeave=${() => setActive(null)}>
    <div class="token-list" ref=${list} role="group" aria-label="The answer's tokens; arrow keys move" onKeyDown=${move}>
      ${node.tokens.map((one, place) => html`<span
        role="button"
        key=${place}
        class=${`token${guessed(one, " accepted", " replaced")}${place === active ? " active" : ""}${place === node.branched ? " branched" : ""}`}
        style=${shade(one.logprob)}
        tabindex=${place === focused ? 0 : -1}
        aria-label=${`${readable(one)}, ${percent(Math.exp(one.logprob))}${guessed(one, ", a draft's guess", ", instead of a draft's guess")}`}
        onMouseEnter=${() => setActive(place)}
        onFocus=${() => (setActive(place), setFocused(place))}
      >${visible(one)}</span>`)}
    </div>
    ${token && html`<div class="card" ref=${card}>
      <p class="card-title">
        <code>${readable(token)}</code> ${percent(Math.exp(token.logprob))}
        <span class="quiet">${` ${(-token.logprob).toFixed(2)} nats${guessed(token, " · guessed by the draft", "")}`}</span>
      </p>
      ${token.rejected?.length > 0 && html`<p class="hint">The draft's guess, thrown away: <${Rejected} token=${token} /></p>`}
      <ul aria-label="Other choices">
        ${token.top.map((other) => html`<li key=${other.id}><button
          type="button"
          disabled=${isBusy || other.id === token.id}
          class=${`choice${other.id === token.id ? " taken" : ""}`}
          onClick=${() => branch(node, active, other)}
        >
          <span class="bar" style=${{ "--w": `${100 * Math.exp(other.logprob)}%` }}></span>
          <span class="hidden">${other.id === token.id ? "Taken:" : "Go on with"}</span><code>${readable(other)}</code><span class="quiet">${percent(Math.exp(other.logprob))}</span>
        </button></li>`)}
      </ul>
      <p class="hint">Choose one, and the answer goes on from there.</p>
    </div>`}
  </div>`;
}

function visible(token) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(token.bytes));
    return token.bytes.length && !/[\p{Cf}\p{Co}]/u.test(text) ? text : readable(token);
  } catch {
    return readable(token);
  }
}

// Messages

function Question({ node }) {
  const [editing, setEditing] = useState(false);
  if (editing) {
    return html`<${Editor}
      label="Your message" text=${node.content} action="Ask" onCancel=${() => setEditing(false)}
      onDone=${(text) => (setEditing(false), ask(text, node.parent))}
    />`;
  }
  return html`<article class="message question" aria-label="You">
    <div class="said" dir="auto">${node.content}</div>
    <div class="actions">
      <${Siblings} node=${node} />
      <${IconButton} icon="edit" label="Edit and ask again" onClick=${() => setEditing(true)} />
    </div>
  </article>`;
}

function Answer({ node, twin }) {
  const [correcting, setCorrecting] = useState(false);
  const isBusy = running.has(node.id);
  const isShaded = state.shading && node.tokens?.length > 0 && node.tokens.every((one) => one.id !== undefined);
  const isDone = !isBusy && node.content && !node.error;
  return html`<article
    class=${`message answer${node.preferred ? " preferred" : ""}`} aria-busy=${isBusy} aria-label=${`Answer of ${node.model}`}
  >
    <header class="byline"><bdi>${node.model}</bdi>${node.branched !== undefined && html`<span> · a branch</span>`}</header>
    ${node.sum && html`<p class="sum"><span class="hidden">Calculated: </span><code>${node.sum}</code></p>`}
    ${correcting
      ? html`<${Editor}
          label="What the answer should have been" text=${node.content} action="Keep the correction"
          onCancel=${() => setCorrecting(false)}
          onDone=${async (text) => {
            setCorrecting(false);
            if (!(await feedback(node, { answer: node.content, correction: text }, { vote: "down" }))) return;
            add("assistant", text, node.parent, { model: node.model, turns: node.turns, sum: node.sum, finish: "corrected" });
            save();
          }}
        />`
      : isBusy && isCall(node)
        ? html`<p class="quiet">Calculating …</p>`
      : isShaded
        ? html`<${Tokens} node=${node} isBusy=${isBusy} />`
        : html`<${Markdown} text=${node.content} />`}
    ${isBusy && html`<span class="writing" aria-hidden="true"></span>`}
    ${node.error && html`<p class="error" role="alert">${node.error}</p>`}
    ${node.notice && html`<p class="error" role="alert">${node.notice}</p>`}
    <div class="actions">
      <${Siblings} node=${node} />
      ${isDone && !correcting && html`
        <${IconButton} icon="up" label="Good answer" pressed=${node.vote === "up"} onClick=${() => vote(node, "up")} />
        <${IconButton} icon="down" label="Bad answer" pressed=${node.vote === "down"} onClick=${() => vote(node, "down")} />
        <${IconButton} icon="edit" label="Correct this answer" onClick=${() => setCorrecting(true)} />
        <${IconButton} icon="copy" label="Copy" onClick=${() => navigator.clipboard?.writeText(node.content).then(() => announce("Copied."))} />
      `}
      ${!isBusy && html`<${IconButton} icon="again" label="Answer again" onClick=${() => again(node)} />`}
      ${isDone && node.tokens?.length > 0 && html`
        <${IconButton} icon="shading" label="Show how probable each token was" pressed=${state.shading}
          onClick=${() => remember("shading", !state.shading)} />
        <${IconButton} icon="inside" label="Look inside" onClick=${() => lookInside(node)} />
      `}
      <span class="facts">${facts(node)}</span>
    </div>
    ${twin && isDone && !running.has(twin.id) && !twin.error && alike(node, twin) && html`<button type="button"
      class="prefer" aria-pressed=${node.preferred === true} onClick=${() => prefer(node, twin)}
    >${node.preferred ? "Preferred" : "This one is better"}</button>`}
  </article>`;
}

function facts(node) {
  const said = [];
  if (node.n_tokens) said.push(`${node.n_tokens} tokens`);
  if (node.speed) said.push(`${Math.round(node.speed).toLocaleString("en")} tokens/s`);
  const right = node.tokens?.filter((one) => one.accepted).length;
  const wrong = node.tokens?.reduce((sum, one) => sum + (one.rejected?.length ?? 0), 0);
  if (right || wrong) said.push(`${right} guessed${wrong ? `, ${wrong} guesses thrown away` : ""}`);
  if (node.left_out) said.push(`the oldest ${node.left_out} messages no longer fit`);
  if (node.finish === "length") said.push("cut off at the limit");
  if (node.finish === "stopped") said.push("stopped");
  if (node.finish === "corrected") said.push("your correction");
  return said.join(" · ");
}

function Siblings({ node }) {
  const all = siblings(node).filter((one) => !one.pair || one.id === node.id || one.pair !== node.pair);
  if (all.length < 2) return null;
  const place = all.indexOf(node);
  return html`<span class="siblings" role="group" aria-label="Versions">
    <${IconButton} icon="left" label="Version before" disabled=${place === 0} onClick=${() => choose(all[place - 1])} />
    <span>${place + 1}/${all.length}</span>
    <${IconButton} icon="right" label="Next version" disabled=${place === all.length - 1} onClick=${() => choose(all[place + 1])} />
  </span>`;
}

function Editor({ label, text, action, onDone, onCancel }) {
  const field = useRef();
  useEffect(() => field.current.focus(), []);
  return html`<form class="editor" onSubmit=${(event) => (event.preventDefault(), onDone(field.current.value))}
    onKeyDown=${(event) => event.key === "Escape" && onCancel()}>
    <textarea ref=${field} aria-label=${label} rows=${Math.min(12, text.split("\n").length + 1)} defaultValue=${text} dir="auto"></textarea>
    <div class="row"><button type="submit" class="primary">${action}</button><button type="button" onClick=${onCancel}>Cancel</button></div>
  </form>`;
}

// The view

export function Chat() {
  const end = useRef();
  const shown = path();
  const isNear = useRef(true);
  const last = shown.at(-1);
  useLayoutEffect(() => {
    if (isNear.current) end.current?.scrollIntoView({ block: "end" });
  }, [last?.content.length, last?.id]);
  const onScroll = ({ target }) => (isNear.current = target.scrollHeight - target.scrollTop - target.clientHeight < 80);
  return html`
    <div class="scroller" onScroll=${onScroll} tabindex="-1">
      <div class="column">
        ${shown.length === 0 && html`<${Welcome} />`}
        ${shown.map((node) => {
          const twin = node.pair && siblings(node).find((one) => one.pair === node.pair && one.id !== node.id);
          if (node.role === "user") return html`<${Question} key=${node.id} node=${node} />`;
          if (!twin) return html`<${Answer} key=${node.id} node=${node} />`;
          const [left, right] = siblings(node).filter((one) => one.pair === node.pair);
          return html`<div class="pair" key=${node.pair}>
            <${Answer} key=${left.id} node=${left} twin=${right} /><${Answer} key=${right.id} node=${right} twin=${left} />
          </div>`;
        })}
        <div ref=${end}></div>
      </div>
    </div>
    <${Composer} />
  `;
}

const Welcome = () => html`<div class="welcome">
  <h1>Talk to <bdi>${state.model ?? "your model"}</bdi></h1>
  <p>Ask something. Then see how probable each of its tokens was, what else it might have said, and go on from there.</p>
</div>`;

function Composer() {
  const [text, setText] = useState("");
  const field = useRef();
  const busy = path().flatMap((node) => [node, ...(node.pair ? siblings(node) : [])]).filter((node) => running.has(node.id));
  useLayoutEffect(() => {
    field.current.style.height = "auto";
    field.current.style.height = `${Math.min(field.current.scrollHeight, 240)}px`;
  }, [text]);
  const stop = () => busy.forEach((node) => running.get(node.id)?.abort());
  const send = (event) => {
    event.preventDefault();
    if (!text.trim() || busy.length || !state.models.length) return;
    if (!state.current) begin();
    ask(text);
    setText("");
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    if (event.key === "Escape" && busy.length) stop();
  };
  return html`<form class="composer" onSubmit=${send}>
    <div class="composer-box">
      <textarea
        ref=${field} rows="1" value=${text} dir="auto" aria-label="Message" placeholder=${state.models.length ? "Message" : "No model is finished yet"}
        onInput=${(event) => setText(event.target.value)} onKeyDown=${onKeyDown}
      ></textarea>
      <div class="row">
        <${IconButton} icon="settings" label="Settings" onClick=${() => set({ dialog: "settings" })} />
        <${IconButton} icon="columns" label="Two answers side by side" pressed=${state.second !== null}
          onClick=${() => set({ second: state.second === null ? (state.models.find((name) => name !== state.model) ?? state.model) : null })} />
        ${state.second !== null && html`<select class="plain" aria-label="The second model" onChange=${(event) => set({ second: event.target.value })}>
          ${state.models.map((name) => html`<option key=${name} value=${name} selected=${name === state.second}>${name}</option>`)}
        </select>`}
        <span class="grow"></span>
        ${busy.length
          ? html`<button type="button" class="primary round" aria-label="Stop" title="Stop (Esc)" onClick=${stop}><${Icon} name="stop" /></button>`
          : html`<button type="submit" class="primary round" aria-label="Send" title="Send (Enter)" disabled=${!text.trim()}><${Icon} name="send" /></button>`}
      </div>
    </div>
  </form>`;
}
