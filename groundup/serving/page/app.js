// The page: header, history, the three views, dialogs. Everything is redrawn when the store changes.

import { html, render, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";
import { key } from "./api.js";
import { Chat } from "./chat.js";
import { connect } from "./connection.js";
import { Inside, Sliders } from "./inside.js";
import {
  announce, begin, configure, download, listen, load, remember, remove, resetSettings, save, set, state, take,
} from "./store.js";
import { Icon, IconButton } from "./text.js";
import { Training } from "./training.js";

const VIEWS = { chat: "Chat", inside: "Look inside", training: "Training" };

function App() {
  const [, redraw] = useState(0);
  useEffect(() => listen(() => redraw((count) => count + 1)), []);
  const View = { chat: Chat, inside: Inside, training: Training }[state.view];
  return html`
    <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), document.getElementById("main").focus())}>Skip to content</a>
    <header class="bar-top">
      ${state.view === "chat" && html`<${IconButton} icon="menu" label="Conversations" aria-expanded=${state.menu} onClick=${() => set({ menu: !state.menu })} />`}
      <span class="brand">groundup</span>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(([name, title]) => html`<a key=${name} href=${`#${name}`} aria-current=${state.view === name ? "page" : undefined}>${title}</a>`)}
      </nav>
      <span class="grow"></span>
      <label class="model"><span class="hidden">Model</span>
        <select onChange=${(event) => remember("model", event.target.value)}>
          ${state.models.map((name) => html`<option key=${name} value=${name} selected=${name === state.model}>${name}</option>`)}
        </select>
      </label>
    </header>
    ${state.offline && html`<p class="banner" role="alert">${state.offline} Trying again …</p>`}
    <div class=${`body${state.menu ? " with-menu" : ""}`}>
      ${state.view === "chat" && html`<${History} />`}
      <main id="main" tabindex="-1"><${View} /></main>
    </div>
    <p class="hidden" role="status">${state.said}</p>
    ${state.dialog === "settings" && html`<${Settings} />`}
    ${state.dialog === "key" && html`<${Key} />`}
  `;
}

function History() {
  const file = useRef();
  const open = (conversation) => set({ current: conversation, menu: false });
  const read = async ({ target }) => {
    try {
      announce(`${await take(target.files[0])} conversations were read.`);
    } catch (error) {
      announce(error.message);
      alert(error.message);
    }
    target.value = "";
  };
  return html`<aside class="history" aria-label="Conversations">
    <button type="button" class="new" onClick=${begin}><${Icon} name="plus" /> New conversation</button>
    <ul>${state.conversations.map((one) => html`<li key=${one.id}>
      <button type="button" class="open" aria-current=${one.id === state.current?.id ? "true" : undefined} onClick=${() => open(one)}><bdi>${one.title || "Untitled"}</bdi></button>
      <${IconButton} icon="trash" label=${`Delete “${one.title.slice(0, 40)}”`} onClick=${() => remove(one)} />
    </li>`)}</ul>
    <div class="row">
      <button type="button" onClick=${download} disabled=${!state.conversations.length}>Export</button>
      <button type="button" onClick=${() => file.current.click()}>Import</button>
      <input ref=${file} type="file" accept="application/json" class="hidden" tabindex="-1" aria-label="Conversations to import" onChange=${read} />
    </div>
  </aside>`;
}

function Dialog({ title, children }) {
  const dialog = useRef();
  useLayoutEffect(() => dialog.current.showModal(), []);
  const close = () => set({ dialog: null });
  return html`<dialog ref=${dialog} aria-labelledby="dialog-title" onClose=${close} onClick=${(event) => event.target === dialog.current && dialog.current.close()}>
    <header><h2 id="dialog-title">${title}</h2><${IconButton} icon="close" label="Close" onClick=${() => dialog.current.close()} /></header>
    ${children}
  </dialog>`;
}

function Settings() {
  const number = (name) => (event) => configure({ [name]: event.target.value === "" ? null : Math.max(0, Math.round(Number(event.target.value))) });
  const { max_tokens, seed } = state.settings;
  return html`<${Dialog} title="Settings">
    <label class="field"><span>System prompt of this conversation</span>
      <textarea rows="3" dir="auto" value=${state.current?.system ?? ""} onChange=${(event) => {
        state.current.system = event.target.value;
        if (state.current.leaf) save();
      }}></textarea></label>
    <${Sliders} />
    <div class="row fields">
      <label class="field"><span>Max tokens</span><input type="number" min="1" inputmode="numeric" value=${max_tokens ?? ""} placeholder="what fits" onChange=${number("max_tokens")} /></label>
      <label class="field"><span>Seed</span><input type="number" min="0" inputmode="numeric" value=${seed ?? ""} placeholder="random" onChange=${number("seed")} /></label>
    </div>
    <div class="row"><button type="button" onClick=${resetSettings}>Defaults</button></div>
  <//>`;
}

function Key() {
  const field = useRef();
  const use = (event) => {
    event.preventDefault();
    key.set(field.current.value.trim());
    set({ dialog: null });
    connect();
  };
  return html`<${Dialog} title="This server needs a key"><form onSubmit=${use}>
    <label class="field"><span>API key, kept until this tab is closed</span><input ref=${field} type="password" autocomplete="off" /></label>
    <div class="row"><button type="submit" class="primary">Use it</button></div>
  </form><//>`;
}

addEventListener("hashchange", () => set({ view: location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat" }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => set({}));
begin();
set({ view: location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat" });
render(html`<${App} />`, document.body);
load();
connect();
