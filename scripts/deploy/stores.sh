# Sourced by backup and restore: how they reach PostgreSQL and MongoDB. Without --compose by DATABASE_URL and
# MONGODB_URI, with tools of this machine; with it in the containers of docker-compose.yml, which bring the tools.
#
#   in_postgres TOOL ARGUMENT...       a tool of PostgreSQL on our database; --dbname= becomes its name
#   in_mongo PART TOOL ARGUMENT...     a tool of MongoDB, whose address is the PART `uri` or `server`
#   of_mongo PART                      what mongo_address.py tells of the address
#
# Addresses are never among the arguments of a process, where all users of the machine can read them.

root=$(cd -- "$here/../.." && pwd)

if [[ $compose ]]; then
  export COMPOSE_FILE=${COMPOSE_FILE:-$root/docker-compose.yml}

  in_postgres() {
    docker compose exec -T postgres sh -c '
      export PGUSER="$POSTGRES_USER" PGPASSWORD="$POSTGRES_PASSWORD" PGDATABASE="$POSTGRES_DB"
      for word; do
        shift
        if [ "$word" = --dbname= ]; then word="--dbname=$PGDATABASE"; fi
        set -- "$@" "$word"
      done
      exec "$@"' sh "$@"
  }

  # The first line of what the container reads is the address, the rest is the tool's.
  in_mongo() {
    local part=$1
    shift
    { mongo_config "$part" && cat; } | docker compose exec -T mongo sh -c '
      umask 077
      config=$(mktemp)
      trap "rm -f \"$config\"" EXIT
      IFS= read -r address
      printf "%s\n" "$address" >"$config"
      "$@" --config="$config"' sh "$@"
  }

  of_mongo() {
    docker compose run --rm --no-deps -T --entrypoint python migrate - "$1" <"$here/mongo_address.py"
  }
else
  PYTHON=${PYTHON:-$root/.venv/bin/python}
  command -v "$PYTHON" >/dev/null || PYTHON=python3

  in_postgres() { PGDATABASE=$DATABASE_URL python3 "$here/pg_environment.py" "$@"; }

  in_mongo() {
    local part=$1 config
    shift
    config=$(umask 077 && mktemp)
    mongo_config "$part" >"$config"
    "$@" --config="$config" || { rm -f -- "$config"; return 1; }
    rm -f -- "$config"
  }

  of_mongo() { MONGODB_URI=$MONGODB_URI "$PYTHON" "$here/mongo_address.py" "$1"; }
fi

mongo_config() {
  local address
  address=$(of_mongo "$1") && printf 'uri: "%s"\n' "$address"
}

# require_tools PROBLEM... : each is a tool and what to do where it is missing, as "tool: what to do".
require_tools() {
  local each
  for each; do
    command -v "${each%%:*}" >/dev/null || fail "${each%%:*} is missing${each#"${each%%:*}"}"
  done
}
