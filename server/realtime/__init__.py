"""WebSocket transport: frames, rooms, presence, and the fan-out of events over Redis pub/sub.

Every frame passes through: ``endpoint`` reads it and dispatches it through a message table; ``channels`` publishes
events and ``presence`` joins and leaves; ``hub`` delivers what Redis sends to the sockets of this process. The
package never imports a feature: ``app.py`` passes in the message tables and the functions that authenticate and
authorize.
"""
