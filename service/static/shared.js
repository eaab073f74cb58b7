"use strict";
// What the page at / and the reference share.

const byId = (id) => document.getElementById(id);

/** Tell it to who listens rather than looks. */
function say(text) {
  byId("live").textContent = text;
}

async function copy(code, button) {
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // not over plain HTTP from another machine: there, the old way
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  say("The command is copied.");
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
