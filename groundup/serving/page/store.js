// What the page knows: conversations in the browser's own database, settings, and what is shown now.
// A conversation is a tree of messages: an answer that is written again, an edited question or a branch is a sibling.

const DEFAULTS = { temperature: 0.8, top_p: 1, top_k: 0, min_p: 0, max_tokens: null, seed: null };
const channel = new BroadcastChannel("groundup");
const listeners = new Set();

export const state = {
  view: ["inside", "training"].includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat",
  models: [],
  model: localStorage.getItem("groundup.model"),
  second: null, // the model beside it, where answers are compared
  settings: { ...DEFAULTS, ...parsed(localStorage.getItem("groundup.settings")) },
  conversations: [], // newest first
  current: null,
  shading: localStorage.getItem("groundup.shading") === "true",
  offline: null,
  said: "", // to a screen reader
  menu: false,
  dialog: null,
  inspecting: null, // {ids} or {text}: what the look inside begins with
};
export const running = new Map(); // message id → AbortController

export function set(patch) {
  Object.assign(state, patch);
  listeners.forEach((listener) => listener());
}
export const listen = (listener) => (listeners.add(listener), () => listeners.delete(listener));
export const announce = (said) => set({ said });

export function configure(patch) {
  set({ settings: { ...state.settings, ...patch } });
  localStorage.setItem("groundup.settings", JSON.stringify(state.settings));
}
export const resetSettings = () => configure(DEFAULTS);
export function remember(name, value) {
  localStorage.setItem(`groundup.${name}`, value);
  set({ [name]: value });
}

/** What is sent with a request: no field that is at its default and could be unknown to another server. */
export function sampling() {
  const { temperature, top_p, top_k, min_p, max_tokens, seed } = state.settings;
  const values = { temperature, top_p, top_k: top_k || null, min_p: min_p || null, max_tokens, seed };
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null));
}

// Conversations

export const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("-");
const blank = () => ({ id: newId(), title: "", updated: Date.now(), system: "", nodes: {}, leaf: null });

export function begin() {
  set({ current: blank(), view: "chat", menu: false });
}

export function path(conversation = state.current, leaf = conversation?.leaf) {
  const found = [];
  for (let node = conversation?.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

export const siblings = (node) =>
  Object.values(state.current.nodes).filter((one) => one.parent === node.parent && one.role === node.role);

export function add(role, content, parent, more = {}) {
  const conversation = state.current;
  const node = { id: newId(), role, content, parent, ...more };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  if (!conversation.title && role === "user") conversation.title = content.trim().slice(0, 80);
  return node;
}

/** Show a message, and below it what was said last. */
export function choose(node) {
  let leaf = node;
  for (let next = node; next; leaf = next ?? leaf) {
    next = Object.values(state.current.nodes).findLast((one) => one.parent === leaf.id);
  }
  state.current.leaf = leaf.id;
  save();
}

/** What the model read before an answer: a call of the calculator and its result are turns, too. */
export function messagesBefore(node) {
  const system = state.current.system.trim();
  const turns = [...path(state.current, node.parent), node].flatMap(({ role, content, turns = [] }) => [...turns, { role, content }]);
  return [...(system ? [{ role: "system", content: system }] : []), ...turns.slice(0, -1)];
}

// The database. Every conversation is a record of its own, so that two tabs do not overwrite each other's.

const database = new Promise((resolve, reject) => {
  const request = indexedDB.open("groundup", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
}).catch(() => null); // a private window may have none: then the conversation lasts as long as the tab

async function store(mode, work) {
  const open = await database;
  if (!open) return [];
  return new Promise((resolve, reject) => {
    const request = work(open.transaction("conversations", mode).objectStore("conversations"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function load() {
  const found = await store("readonly", (table) => table.getAll());
  const conversations = found.sort((one, other) => other.updated - one.updated);
  const fresh = conversations.find((one) => one.id === state.current?.id);
  const mine = state.current && Object.keys(state.current.nodes).some((id) => running.has(id));
  set({ conversations, ...(fresh?.updated > state.current?.updated && !mine ? { current: fresh } : {}) });
}

export async function save(conversation = state.current) {
  conversation.updated = Date.now();
  set({ conversations: [conversation, ...state.conversations.filter((one) => one.id !== conversation.id)] });
  await store("readwrite", (table) => table.put(conversation));
  channel.postMessage("changed");
}

export async function remove(conversation) {
  await store("readwrite", (table) => table.delete(conversation.id));
  if (state.current?.id === conversation.id) begin();
  set({ conversations: state.conversations.filter((one) => one.id !== conversation.id) });
  channel.postMessage("changed");
}

channel.onmessage = load;

// Export and import

export function download() {
  const text = JSON.stringify({ groundup: 1, conversations: state.conversations }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `groundup-conversations-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** The number of conversations that were taken over; throws if the file is none of ours. */
export async function take(file) {
  const value = parsed(await file.text());
  const found = Array.isArray(value.conversations) ? value.conversations.map(checked) : [];
  if (!found.length || found.includes(null)) throw new Error(`${file.name} holds no conversations of this page.`);
  for (const conversation of found) await store("readwrite", (table) => table.put(conversation));
  channel.postMessage("changed");
  await load();
  return found.length;
}

function checked(value) {
  const isText = (one) => typeof one === "string";
  const nodes = Object.values(value?.nodes ?? {});
  const areNodes = nodes.every(
    (node) => isText(node?.id) && value.nodes[node.id] === node && isText(node.content) &&
      ["user", "assistant"].includes(node.role) && (node.parent === null || value.nodes[node.parent]),
  );
  const rises = (node, steps) => steps > 0 && (node.parent === null || rises(value.nodes[node.parent], steps - 1));
  if (!areNodes || !nodes.every((node) => rises(node, Math.min(nodes.length, 5000))) || ![value?.id, value?.title, value?.system].every(isText)) return null;
  const kept = nodes.map(({ id, role, content, parent, model, finish }) => [
    id, { id, role, content, parent, model: isText(model) ? model : undefined, finish: isText(finish) ? finish : undefined },
  ]);
  const leaf = value.nodes[value.leaf] ? value.leaf : null;
  const updated = Number.isFinite(value.updated) ? value.updated : Date.now();
  return { id: value.id, title: value.title, system: value.system, updated, leaf, nodes: Object.fromEntries(kept) };
}

function parsed(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
}
