// Commands name this service as it was reached, and can be copied.
for (const code of document.querySelectorAll(".command code")) {
  code.textContent = code.textContent.replaceAll(/http:\/\/127\.0\.0\.1:\d+\//g, new URL("./", location.href).href);
  const button = document.createElement("button");
  button.className = "button small";
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", () => copy(code, button));
  code.after(button);
}
