# Sourced by backup and restore: connects them to PostgreSQL and MongoDB. Without --compose it uses DATABASE_URL and
# Sourced by backup and restore: connects them to PostgreSQL and MongoDB. Without --compose it uses DATABASE_URL and
# MONGODB_URI with the tools of this machine; with --compose the containers of docker-compose.yml and their tools.
#   in_postgres TOOL ARGUMENT...       run a tool of PostgreSQL on the database; --dbname= is completed with its name
#   in_mongo PART TOOL ARGUMENT...     run a tool of MongoDB on the PART `uri` or `server` of the address
#   of_mongo PART                      print a part of the address with mongo_address.py
#
# Addresses are never arguments of a process, because all users of the machine can read those.

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

  # The first line on the container's stdin is the address, the rest is the tool's input.
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

# require_tools TOOL_AND_HINT... : fail if a tool is missing; each argument is "tool: how to install it".
require_tools() {
  local entry
  for entry; do
    command -v "${entry%%:*}" >/dev/null || fail "${entry%%:*} is missing${entry#"${entry%%:*}"}"
  done
}
