// What a model wrote, made safe to show: Markdown without images, forms or anything that runs or is fetched.

import { marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";
import { html, useLayoutEffect, useRef } from "./vendor/preact-htm.js";

const MOST = 50_000; // characters that are read as Markdown; more is shown as plain text
const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "em", "strong", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a", "h1", "h2", "h3", "h4",
    "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "sub", "sup",
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("rel", "noopener noreferrer nofollow");
    node.setAttribute("target", "_blank");
  }
  if (/^H[1-6]$/.test(node.tagName)) node.setAttribute("role", "presentation"); // not a part of this page's outline
  if (node.tagName === "PRE") node.setAttribute("tabindex", "0"); // may scroll: by keyboard, too
});

// What looks like HTML stays text: a model that writes <script> is shown writing <script>.
marked.use({ gfm: true, breaks: true, tokenizer: { html: () => undefined, tag: () => undefined } });

export function Markdown({ text }) {
  const place = useRef();
  useLayoutEffect(() => {
    const holder = place.current;
    try {
      if (text.length > MOST) throw new Error("too long");
      holder.replaceChildren(DOMPurify.sanitize(marked.parse(text), ALLOWED));
      holder.classList.remove("plain");
    } catch {
      holder.textContent = text;
      holder.classList.add("plain");
    }
  }, [text]);
  return html`<div class="markdown" dir="auto" ref=${place}></div>`;
}

const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

/** A token's text with every character visible. */
export function readable(token) {
  if (!token.bytes.length) return token.text;
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(token.bytes));
    return text
      .replaceAll("\n", "↵")
      .replaceAll("\t", "⇥")
      .replace(HIDDEN, (letter) => `\\u{${letter.codePointAt(0).toString(16)}}`)
      .replaceAll(" ", "·");
  } catch {
    return `⟨${token.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}⟩`;
  }
}

export const percent = (share) =>
  share >= 0.9995 ? "100%" : share >= 0.1 ? `${(100 * share).toFixed(0)}%` : share >= 0.0005 ? `${(100 * share).toFixed(1)}%` : "<0.1%";

/** How strongly a token is shaded: 7 nats and more (under 0.1%) as strongly as the text stays easy to read. */
export const shade = (logprob) => ({ "--p": Math.min(42, (-(logprob ?? 0) / 7) * 42).toFixed(1) });

/** Words for a token that a draft guessed rightly, or wrongly. */
export const guessed = (token, right, wrong) => (token.accepted ? right : token.rejected?.length ? wrong : "");
export const Rejected = ({ token }) => html`<del>${token.rejected.map((one, place) => html`<code key=${place}>${readable(one)}</code>`)}</del>`;

const PATHS = {
  up: "M7 11v9H4v-9zM7 11l4-7c2 0 2.6 1.5 2 3l-1 3h6c1.5 0 2.3 1.3 2 2.6l-1.3 5.4c-.3 1.2-1.2 2-2.5 2H7",
  down: "M17 13V4h3v9zM17 13l-4 7c-2 0-2.6-1.5-2-3l1-3H6c-1.5 0-2.3-1.3-2-2.6l1.3-5.4C5.600 4.8 6.500 4 7.800 4H17",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  again: "M20 11a8 8 0 1 0-2.3 6M20 5v6h-6",
  inside: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14M16 16l5 5",
  shading: "M4 7h10M4 12h16M4 17h7",
  columns: "M4 5h16v14H4zM12 5v14",
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  send: "M12 20V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  settings: "M4 8h10M18 8h2M4 16h2M10 16h10M16 6v4M8 14v4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  close: "M6 6l12 12M18 6L6 18",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
};

export const Icon = ({ name }) => html`
  <svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false"><path d=${PATHS[name]} /></svg>
`;

export const IconButton = ({ icon, label, pressed, ...rest }) => html`
  <button type="button" class="icon-button" aria-label=${label} title=${label} aria-pressed=${pressed} ...${rest}>
    <${Icon} name=${icon} />
  </button>
`;
