// Which models there are, and what to do while the server does not answer.

import * as api from "./api.js";
import { announce, set, state } from "./store.js";

export async function connect() {
  try {
    const models = (await api.get("v1/models")).data.map((one) => one.id);
    const keep = (name) => (models.includes(name) ? name : null);
    set({ models, model: keep(state.model) ?? models[0] ?? null, second: keep(state.second), offline: null });
  } catch (error) {
    connectionLost(error);
  }
}

let waiting = false;

/** Say so, and try until the server is there again; where it wants a key, ask for one. */
export async function connectionLost(error) {
  if (error.status === 401) return set({ dialog: "key" });
  set({ offline: error.message });
  if (waiting) return;
  waiting = true;
  for (let seconds = 1; state.offline; seconds = Math.min(10, seconds * 1.5)) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    try {
      await api.get("health");
      await connect();
      announce("The server is there again.");
    } catch (again) {
      set({ offline: again.message });
    }
  }
  waiting = false;
}
