# fish completion for xtool
set -g __xtool_verbs @VERBS@
set -g __xtool_valued @VALUED@

function __xtool_words  # the words before the cursor's, after the global options: verb first
    set -l words (commandline -opc)
    set -e words[1]
    while set -q words[1]
        switch $words[1]
            case -H --host
                set -e words[1]
                set -q words[1]; and set -e words[1]
            case '-*'
                set -e words[1]
            case '*'
                break
        end
    end
    set -q words[1]; or return
    if not contains -- $words[1] $__xtool_verbs
        set -l fits (string match -- "$words[1]*" $__xtool_verbs)
        test (count $fits) = 1; and set words[1] $fits[1]
    end
    printf '%s\n' $words
end

function __xtool_plain  # the same without options and their values
    set -l words (__xtool_words)
    set -q words[1]; or return
    printf '%s\n' $words[1]
    set -l verb $words[1]
    set -l skip 0
    for word in $words[2..-1]
        if test $skip = 1
            set skip 0
        else if contains -- "$verb $word" $__xtool_valued
            set skip 1
        else if not string match -q -- '-*' $word
            printf '%s\n' $word
        end
    end
end

function __xtool_at  # VERB [SUB]: is this the verb (and the command below it)?
    set -l words (__xtool_plain)
    test "$words[1]" = $argv[1]; or return 1
    set -q argv[2]; or return 0
    test "$words[2]" = $argv[2]
end

function __xtool_argument  # FROM TO VERB [SUB]: is the argument at the cursor one of these?
    __xtool_at $argv[3..-1]; or return 1
    set -l count (math (count (__xtool_plain)) - (count $argv[3..-1]) + 1)
    test $count -ge $argv[1] -a $count -le $argv[2]
end

function __xtool_ask  # KIND
    set -l host
    set -l words (commandline -opc)
    for i in (seq (math (count $words) - 1))
        contains -- $words[$i] -H --host; and set host -H $words[(math $i + 1)]
    end
    xtool $host __complete $argv[1] (__xtool_plain)[2] 2>/dev/null
end

complete -c xtool -f
complete -c xtool -n 'not __xtool_words' -s H -l host -x -a '@HOSTS@' -d 'carry the verb out on another host'
complete -c xtool -n 'not __xtool_words' -s v -l verbose -d 'tell more'
complete -c xtool -n 'not __xtool_words' -l version -d 'show the version'
@LINES@
