# bash completion for xtool
_xtool_verbs=@VERBS@
_xtool_globals=@GLOBALS@
_xtool_settings=@SETTINGS@
declare -gA _xtool_options=(@OPTIONS@)
declare -gA _xtool_values=(@VALUES@)
declare -gA _xtool_arguments=(@ARGUMENTS@)
declare -gA _xtool_below=(@BELOW@)

_xtool_ask() { xtool ${_xtool_host:+-H "$_xtool_host"} __complete "$@" 2>/dev/null; }

_xtool_from() {  # SOURCE: fill COMPREPLY with what begins like the word
    local cur=$_xtool_cur line
    case $1 in
    @files)
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
        ;;
    @settings)
        compopt -o nospace 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -W "$_xtool_settings" -- "$cur")
        ;;
    @*)
        while IFS= read -r line; do
            [[ $line == "$cur"* ]] && COMPREPLY+=("$(printf %q "$line")")
        done < <(_xtool_ask "${1#@}" "$_xtool_domain")
        ;;
    *) mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur") ;;
    esac
}

_xtool() {
    local verb= word skip= i count=0 fits
    local _xtool_host= _xtool_domain= _xtool_cur=$2
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $skip ]]; then
            [[ $skip == -H ]] && _xtool_host=$word
            skip=
        elif [[ -z $verb ]]; then
            case $word in
            -H | --host) skip=-H ;;
            -H*) _xtool_host=${word#-H} ;;
            -*) ;;
            *)
                verb=$word
                if [[ " $_xtool_verbs " != *" $verb "* ]]; then  # shortened
                    mapfile -t fits < <(compgen -W "$_xtool_verbs" -- "$verb")
                    ((${#fits[@]} == 1)) && verb=${fits[0]}
                fi
                ;;
            esac
        elif [[ $word == -* ]]; then
            [[ -n ${_xtool_values["$verb $word"]+x} ]] && skip=$word
        elif [[ " ${_xtool_below[$verb]-} " == *" $word "* ]]; then
            verb="$verb $word"
        else
            ((count++)) || _xtool_domain=$word
        fi
    done
    if [[ $skip == -H ]]; then
        _xtool_from @HOSTS@
    elif [[ $skip ]]; then
        _xtool_from "${_xtool_values["$verb $skip"]}"
    elif [[ -z $verb && $2 == -* ]]; then
        _xtool_from "$_xtool_globals"
    elif [[ -z $verb ]]; then
        _xtool_from "$_xtool_verbs"
    elif [[ $2 == -* ]]; then
        _xtool_from "${_xtool_options[$verb]-}"
    else
        local IFS=$'\n' kinds
        kinds=(${_xtool_arguments[$verb]-})
        IFS=$' \t\n'
        [[ ${kinds[-1]-} == ... && $count -ge $((${#kinds[@]} - 1)) ]] && count=$((${#kinds[@]} - 2))
        if ((count < ${#kinds[@]})) && [[ ${kinds[count]} != - ]]; then
            _xtool_from "${kinds[count]}"
        elif [[ ${_xtool_below[$verb]-} && $count == 0 ]]; then
            _xtool_from "${_xtool_below[$verb]}"
        fi
    fi
}
complete -F _xtool xtool
