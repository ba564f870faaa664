// An unmodified y-websocket client that is controlled over stdin: one JSON command per line, one JSON result per line.
//
// Usage: node editor.mjs WS_URL DOCUMENT TOKEN
import readline from "node:readline";
import { WebSocket } from "ws";
import * as Y from "yjs";
import { WebsocketProvider } from "y-websocket";

const [url, documentId, token] = process.argv.slice(2);
const doc = new Y.Doc();
const text = doc.getText("content");
const provider = new WebsocketProvider(url, documentId, doc, {
  WebSocketPolyfill: WebSocket,
  protocols: ["collab.v1", `bearer.${token}`],
  disableBc: true,
  maxBackoffTime: 500,
});
const closed = [];
provider.on("connection-close", (event) => closed.push(event.code));
provider.on("connection-error", () => {});

const commands = {
  insert: ({ at, text: piece }) => text.insert(at ?? text.length, piece),
  remove: ({ at, length }) => text.delete(at, length),
  state: () => ({
    text: text.toString(),
    synced: provider.synced,
    connected: provider.wsconnected,
    trying: provider.shouldConnect,
    closed,
    clientId: doc.clientID,
    others: [...provider.awareness.getStates()].filter(([id]) => id !== doc.clientID),
  }),
  show: ({ state }) => provider.awareness.setLocalState(state),
  disconnect: () => provider.disconnect(),
  connect: () => provider.connect(),
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  const result = commands[command.do](command) ?? null;
  process.stdout.write(JSON.stringify(result) + "\n");
}
process.exit(0);
