// Starts `cachepolicy lsp` for policies, and starts it again when its command is changed.
"use strict";

const vscode = require("vscode");
const { LanguageClient, TransportKind } = require("vscode-languageclient/node");

let client;

async function start() {
  const [command, ...args] = vscode.workspace.getConfiguration("cachepolicy").get("command");
  client = new LanguageClient(
    "cachepolicy",
    "cachepolicy",
    { command, args, transport: TransportKind.stdio },
    { documentSelector: [{ language: "cachepolicy" }] },
  );
  try {
    await client.start();
  } catch (error) {
    client = undefined;
    const advice = 'Install it with: pip install "cachepolicy[lsp]", or name its command in "cachepolicy.command".';
    vscode.window.showErrorMessage(`The language server \`${command}\` does not start: ${error.message ?? error}. ${advice}`);
  }
}

async function restart() {
  await deactivate();
  await start();
}

async function activate(context) {
  context.subscriptions.push(
    vscode.commands.registerCommand("cachepolicy.restart", restart),
    vscode.workspace.onDidChangeConfiguration((change) => {
      if (change.affectsConfiguration("cachepolicy.command")) return restart();
    }),
  );
  await start();
}

async function deactivate() {
  const running = client;
  client = undefined;
  if (running) await running.stop();
}

module.exports = { activate, deactivate };
